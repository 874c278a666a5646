"""benchmarks/gpu_models.py at tiny sizes under the interpreter: what has to run on a GPU runs, and its budget holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.gpu_models import cases, measure, small

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("decode_1b", "decode_8b", "prefill", "transformed")
ALL = {f"{part}: {case.name}": case for part in PARTS for case in cases(part)}


@pytest.mark.parametrize(
    "name",
    [
        "decode_1b: batch 8, context 2048",
        "transformed: duo 50%, 32k",
        "transformed: int4",
        "transformed: tree of 64 rows",
    ],
)
def test_a_step_is_finite_and_counted(name: str) -> None:
    found = measure(small(ALL[name]), "cpu")
    assert found["finite"]
    assert found["launches"] > 10
    assert found["seconds"]["graphopt"] > 0


def test_bounded_heads_and_packed_weights_are_fewer_bytes() -> None:
    dense, packed = (measure(small(ALL[f"transformed: {name}"]), "cpu")["bytes"] for name in ("dense", "int4"))
    assert packed < 0.6 * dense


def test_every_transformed_model_names_what_it_is_beside() -> None:
    named = [case for case in ALL.values() if case.beside]
    assert len(named) >= 7
    assert all(f"transformed: {case.beside}" in ALL for case in named)


def test_the_whole_stays_below_nine_minutes() -> None:
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    kernels = int(re.findall(r"kernels_limit=(\d+)", text)[0])
    parts = [int(limit) for limit in re.findall(r"\w+:(\d+)", text.split("models=(")[1].split(")")[0])]
    assert kernels + sum(parts) <= 540 - 10
