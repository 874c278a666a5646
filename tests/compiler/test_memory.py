"""Promises about memory: kept with the same bits, or refused before the run starts; sampled verification still bites."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from graphopt import compile
from graphopt.compiler import memory
from graphopt.compiler.verify import verify
from graphopt.diagnostics import PlanError, VerifyError
from graphopt.ir.program import Program
from graphopt.ir.weights import Affine
from graphopt.observe.stream import Limits
from graphopt.passkit.edits import Plan, Skip, apply_edits
from graphopt.passkit.facts import Effect
from graphopt.views import Views
from tests import tiny

SPEC = """
graphopt: 1
calibration: {data: tokens.npy, samples: 6, seq: 20}
evaluation: {data: tokens.npy, samples: 4, seq: 20}
steps:
  - use: prune_units
    units: [kv_group, neuron]
    keep: 75%
    score: {kind: fluctuation, metric: wifv}
    allocate: global
    compensate: mean_bias
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory")
    tiny.checkpoint(directory / "model", "llama_mha")
    np.save(directory / "tokens.npy", np.random.default_rng(0).integers(3, 96, 400))
    (directory / "spec.yaml").write_text(SPEC)
    return directory


def test_too_little_memory_is_refused_before_the_start(place: Path) -> None:
    with pytest.raises(PlanError, match=r"this run needs \d.* GiB, more than the 0.00 GiB") as caught:
        compile(place / "model", place / "spec.yaml", out=place / "refused", memory=1 << 20)
    assert caught.value.code == "memory_too_small"
    assert caught.value.diagnostics[0].help[0].startswith("allow --memory ")
    assert not (place / "refused").exists()


def test_a_broken_promise_is_not_silent() -> None:
    with pytest.raises(PlanError) as caught:
        memory.Budget(0, (), 1 << 20, None, None, None).check()
    assert caught.value.code == "memory_exceeded"


def skipped(program: Program, *layers: int) -> tuple[Program, Plan]:
    views = Views(program)
    plan = Plan(tuple(Skip(views.blocks[i].path, i) for i in layers or (1,)))
    return apply_edits(program, views, plan.edits), plan


def wide() -> Program:
    return tiny.capture_model(tiny.make_model("llama", num_hidden_layers=5))


def test_a_sample_is_verified_and_named() -> None:
    program = wide()
    after, plan = skipped(program)
    limits = Limits(weights=1, split=True)
    certificate = verify(program, after, plan, Effect.APPROXIMATE, "full", None, "skip", limits)
    assert certificate["level"] == "sampled"
    assert "model.layers.1" in certificate["blocks"]
    assert len(certificate["blocks"]) == 3
    assert certificate["of_blocks"] == 5
    assert certificate["largest_relative_error"] <= certificate["tolerance"]


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 4, 5), (3, 4, 5, 6), (5, 6, 7)])
def test_layers_skipped_in_a_row_pass_by_those_that_are_not_sampled(layers: tuple[int, ...]) -> None:
    program = tiny.capture_model(tiny.make_model("llama", num_hidden_layers=8))
    after, plan = skipped(program, *layers)
    certificate = verify(program, after, plan, Effect.APPROXIMATE, "full", None, "skip", Limits(split=True))
    assert len(certificate["blocks"]) == 3


def test_a_sample_catches_what_is_wrong_in_it() -> None:
    program = wide()
    after, plan = skipped(program)
    weights = after.weights
    for name in weights:
        if name.endswith("down_proj.weight"):
            weights = weights.with_expr(name, lambda expr: Affine(expr, 1.001))
    broken = dataclasses.replace(after, weights=weights)
    with pytest.raises(VerifyError) as caught:
        verify(program, broken, plan, Effect.APPROXIMATE, "full", None, "skip", Limits(split=True))
    assert caught.value.code == "promise_broken"
