"""`lower(program, target)`: programs, transformed and cached ones, as kernels."""

from __future__ import annotations

import json

import pytest
import torch

import graphopt
from graphopt.backends import lower
from graphopt.diagnostics import PlanError
from graphopt.passkit import PassRegistry
from graphopt.report.lowered import ROOFS, lowered_json, lowered_page
from graphopt.spec import parse_spec
from tests.tiny import program, tokens


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "neox"])
def test_a_lowered_program_equals_the_program(name: str) -> None:
    source = program(name)
    made = lower(source, "cpu", interpret=True)
    reference = source.module()
    for batch, length in ((1, 1), (2, 9)):
        ids = tokens(batch, length)
        for mine, wanted in zip(made(input_ids=ids), reference(input_ids=ids), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    templates = {group.kernel.template for group in made.lowered.groups}
    assert {"attention", "reduction", "pointwise"} <= templates


def test_one_token_runs_as_matrix_vector_kernels() -> None:
    source = program("llama")
    made = lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1})
    ids = tokens(1, 1)
    torch.testing.assert_close(made(input_ids=ids)[0], source.module()(input_ids=ids)[0], rtol=1e-4, atol=1e-4)
    products = [group for group in made.lowered.groups if group.kernel.template == "gemv"]
    assert len(products) >= 3 * len([1 for g in made.lowered.groups if "attention" in g.kernel.template])
    assert not [name for name in made.lowered.library if name in ("aten.mm.default", "aten.addmm.default")]


def test_on_a_cpu_it_runs_eager_and_says_so() -> None:
    source = program("llama")
    made = lower(source, "cpu")
    assert made.lowered.mode == "eager library calls"
    ids = tokens(2, 7)
    torch.testing.assert_close(made(input_ids=ids)[0], source.module()(input_ids=ids)[0])


def test_inductor_runs_a_program() -> None:
    source = program("llama")
    made = lower(source, "cpu", cpu="inductor")
    ids = tokens(2, 7)
    torch.testing.assert_close(made(input_ids=ids)[0], source.module()(input_ids=ids)[0], rtol=1e-4, atol=1e-4)


def test_the_report_adds_up() -> None:
    made = lower(program("llama"), "cuda", dtype=torch.bfloat16, sizes={"B": 1})
    found = lowered_json(made, {"B": 1, "S": 64}, ROOFS["h200"])
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1.0)
    assert found["launches"] == sum(row["count"] for row in found["rows"])
    name = next(row["name"] for row in found["rows"] if row["name"].startswith("reduction"))
    page = lowered_page(made, {"B": 1, "S": 64}, ROOFS["h200"], name).plain()
    assert "@triton.jit" in page
    assert "% of the roofline" in page


def test_what_is_gathered_counts_as_the_rows_that_are_asked_for() -> None:
    """A table of embeddings and banks of experts, packed ones too, move no more than what a step reads of them."""
    steps = [{"use": "quantize", "bits": 4, "group": 8}, {"use": "insert_cache"}]
    spec = parse_spec(json.dumps({"graphopt": 1, "steps": steps}), registry=PassRegistry())
    made = lower(graphopt.compile(program("mixtral"), spec, verify="off"), "cuda", sizes={"B": 1, "S": 1})
    found = lowered_json(made, {"B": 1, "S": 1, "C": 32}, ROOFS["b200"])
    assert found["roof"]["source"] == "data sheet"
    table = next(row for row in found["rows"] if row["name"] == "aten::embedding")
    assert table["moved"] == 2 * 32 * 4 + 8
    bank = next(row for row in found["rows"] if row["kernel"] == "expert_gemv" and "silu" not in row["ops"])
    codes, scales = 2 * 48 * 16, 2 * (2 * 48 * 4) * 4  # of 2 experts of the 4
    assert codes + scales < bank["moved"] / bank["count"] < 1.5 * (codes + scales)
    assert {"cached_attention", "gemv", "reduction"} <= {row["kernel"] for row in found["rows"]}


def test_unknown_dimensions_are_named() -> None:
    with pytest.raises(PlanError, match="'T'"):
        lower(program("llama"), "cpu", sizes={"T": 1})
