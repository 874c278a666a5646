"""benchmarks/gpu_steps.py at tiny sizes under the interpreter: every result beside float64, peers included."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_steps import TINY, Case, Maker, measure


def maker() -> Maker:
    return Maker(TINY, "cpu")


def measured(made: Case, peers: set[str]) -> None:
    found = measure(made, "cpu", 1e9)
    assert found["right"] == dict.fromkeys({"graphopt", *peers}, True)
    assert not found["failed"]
    assert set(found["seconds"]) == {"graphopt", *peers}


@pytest.mark.parametrize("share", [0, 50])
def test_attention(share: int) -> None:
    peers = {"flex_attention"} | ({"scaled_dot_product_attention"} if not share else set())
    with torch.no_grad():
        whole, part = maker().step(0), maker().step(share)
        assert whole.bytes is not None
        assert part.bytes is not None
        assert part.bytes <= whole.bytes * (1 - share / 200)
        measured(part, peers)
        measured(maker().whole_text(share), peers)


@pytest.mark.parametrize("rows", TINY.rows)
def test_experts(rows: int) -> None:
    with torch.no_grad():
        measured(maker().expert_products(rows), {"grouped_mm"})


def test_every_ratio_has_its_case() -> None:
    with torch.no_grad():
        made = [build() for build in maker().cases()]
    names = [case.name for case in made]
    assert len(set(names)) == len(names)
    assert {case.beside for case in made if case.beside} <= set(names)
