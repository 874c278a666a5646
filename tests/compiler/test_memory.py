"""Promises about memory: kept with the same bits, or refused before the run starts; sampled verification still bites."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import compile
from graphopt.compiler import memory
from graphopt.compiler.compile import capture
from graphopt.compiler.estimate import memory_budget
from graphopt.compiler.resolve import resolve
from graphopt.compiler.verify import verify
from graphopt.diagnostics import PlanError, VerifyError
from graphopt.ir.program import Program
from graphopt.ir.weights import Affine
from graphopt.observe.spill import Spill
from graphopt.observe.stream import Limits
from graphopt.passkit import PassRegistry
from graphopt.passkit.edits import Plan, Skip, apply_edits
from graphopt.passkit.facts import Effect
from graphopt.spec import load_spec
from graphopt.views import Views
from tests import tiny

SPEC = """
graphopt: 1
calibration: {data: tokens.npy, samples: 24, seq: 20, batch: 2}
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
    np.save(directory / "tokens.npy", np.random.default_rng(0).integers(3, 96, 1000))
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


def weights_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def needs_of(place: Path) -> dict[str, memory.Need]:
    """What the stages of the run need, counted without a limit."""
    resolved = resolve(load_spec(place / "spec.yaml", registry=PassRegistry()))
    limits = memory_budget(capture(place / "model"), resolved, "shapes", None, None, whole=True)
    return {need.stage: need for need in limits.needs}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_run_within_limits_has_the_same_bits(place: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the least that calibration needs and all that it would use, activations go to a file."""
    monkeypatch.setattr(memory, "resident", lambda: 0)
    monkeypatch.setattr(memory, "peak_memory", lambda: 0)
    for constant in ("SLACK", "SCORING", "WRITING"):
        monkeypatch.setattr(memory, constant, 0)
    observe = needs_of(place)["observe"]
    least = max(need.least for need in needs_of(place).values())
    assert least < observe.bytes
    wrote: list[int] = []
    put = Spill.put

    def counted(spill: Spill, *rest: Any) -> Any:
        kept = put(spill, *rest)
        wrote.append(spill.written)
        return kept

    monkeypatch.setattr(Spill, "put", counted)
    whole, limited = place / f"whole-{share}", place / f"limited-{share}"
    compile(place / "model", place / "spec.yaml", out=whole, verify="shapes")
    assert max(wrote) == 0
    promised = least + int(share * (observe.bytes - least))
    compile(place / "model", place / "spec.yaml", out=limited, verify="shapes", memory=promised)
    assert (max(wrote) > 0) == (share < 1)
    assert weights_of(whole) == weights_of(limited) != {}
    with pytest.raises(PlanError, match="this run needs"):
        compile(place / "model", place / "spec.yaml", out=place / "refused", verify="shapes", memory=least - 1)
    assert not list(place.glob(".*"))


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
