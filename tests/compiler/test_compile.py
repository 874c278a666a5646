"""The compile loop: certificates, the trail, plans that change nothing, and promises that are enforced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import graphopt
from graphopt.compiler.compile import plan_steps
from graphopt.compiler.resolve import resolve
from graphopt.diagnostics import PlanError, VerifyError
from graphopt.ir.text import fingerprint
from graphopt.passkit import Context, Effect, Fact, Pass, PassRegistry
from graphopt.passkit.edits import Plan, Skip
from graphopt.spec import parse_spec
from graphopt.views import size_of
from tests.compiler.test_faults import write

THREE = (
    "steps:\n"
    "  - use: regroup_kv\n    kv_heads: 2\n    init: svd\n"
    "  - use: prune_neurons\n    keep: 50%\n    score: fluctuation\n    compensate: mean_bias\n"
    "  - use: skip_layers\n    layers: 1\n"
)


def test_chain_is_certified_and_loads_in_plain_transformers(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    program = graphopt.compile(None, write(tmp_path, checkpoint, THREE), out=out)
    assert [step.step for step in program.trail] == ["regroup_kv", "prune_neurons", "skip_layers"]
    for step in program.trail:
        assert step.certificate["level"] == "full"
        assert step.certificate["largest_relative_error"] <= step.certificate["tolerance"] < 1e-10
        assert step.after["parameters"] < step.before["parameters"]
        assert step.edits
    ids = torch.arange(1, 13).reshape(1, 12)
    expected = program.module()(input_ids=ids)[0]
    torch.save({"ids": ids, "expected": expected}, tmp_path / "case.pt")
    code = (
        "import sys, torch; sys.modules['graphopt'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"case = torch.load({str(tmp_path / 'case.pt')!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, dtype=torch.float32)\n"
        "error = (model(input_ids=case['ids']).logits - case['expected']).abs().max().item()\n"
        "assert type(model).__name__ == 'LlamaForCausalLM' and error < 1e-5, error\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / "spec.lock.yaml").is_file()
    again = graphopt.load(out)
    torch.testing.assert_close(again.module()(input_ids=ids)[0], expected, rtol=1e-5, atol=1e-5)


def test_uneven_result_loads_through_auto_classes_and_generates(tmp_path: Path, checkpoint: Path) -> None:
    body = (
        "steps:\n"
        "  - use: prune_heads\n    unit: kv_group\n    keep: 50%\n    where: {layers: 1}\n    compensate: mean_bias\n"
        "    score: fluctuation\n"
        "  - use: prune_neurons\n    keep: 75%\n    where: {layers: 0}\n"
    )
    out = tmp_path / "out"
    program = graphopt.compile(None, write(tmp_path, checkpoint, body), out=out)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, program.module()(input_ids=ids)[0])
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)
    assert fingerprint(graphopt.load(out)) == fingerprint(program)


def test_plan_changes_nothing_and_repeats(tmp_path: Path, checkpoint: Path) -> None:
    from graphopt.spec import load_spec

    program = graphopt.capture(checkpoint)
    before = fingerprint(program)
    loaded = load_spec(write(tmp_path, checkpoint, THREE), registry=PassRegistry())
    first = [[edit.to_json() for edit in plan.edits] for _, plan in plan_steps(program, loaded)]
    second = [[edit.to_json() for edit in plan.edits] for _, plan in plan_steps(program, loaded)]
    assert fingerprint(program) == before
    assert first == second


def test_surgery_that_differs_from_its_emulation_stops_the_run(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = sys.modules["graphopt.views.cutting"]
    true_indices = cutting.indices

    def off_by_one(axis: Any, keep: Any) -> Any:
        found = true_indices(axis, keep)
        return found if len(found) == size_of(axis) else (found + 1) % size_of(axis)

    monkeypatch.setattr(cutting, "indices", off_by_one)
    with pytest.raises(VerifyError) as caught:
        graphopt.compile(None, write(tmp_path, checkpoint, "steps:\n  - use: prune_neurons\n    keep: 50%\n"))
    assert caught.value.code == "promise_broken"
    assert "fault.yaml:6:" in str(caught.value)


class Wrong(Pass):
    """Claims exactness and skips a layer."""

    name: ClassVar[str] = "wrong"
    effect: ClassVar[Effect] = Effect.EXACT

    def plan(self, context: Context) -> Plan:
        """Skip block 0."""
        return Plan((Skip(context.views.blocks[0].path, 0),))


class Cached(Pass):
    """Stands for a pass after which nothing may be cut."""

    name: ClassVar[str] = "cached"
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.KV_CACHED})


class Uncached(Pass):
    """Stands for a pass that must come before caches."""

    name: ClassVar[str] = "uncached"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.KV_CACHED})


class Table:
    """A registry of the passes above."""

    def names(self) -> list[str]:
        """All names."""
        return ["cached", "uncached", "wrong"]

    def get(self, name: str, /) -> type[Pass]:
        """The class of a name."""
        return {"cached": Cached, "uncached": Uncached, "wrong": Wrong}[name]


def test_false_claim_of_exactness_is_refused(checkpoint: Path) -> None:
    loaded = parse_spec(f"graphopt: 1\nmodel: {checkpoint}\nsteps:\n  - use: wrong\n", registry=Table())
    with pytest.raises(VerifyError, match="differs from the original"):
        graphopt.compile(None, loaded)


def test_illegal_order_names_both_steps_without_a_model() -> None:
    loaded = parse_spec("graphopt: 1\nsteps:\n  - use: cached\n  - use: uncached\n", registry=Table(), file="o.yaml")
    with pytest.raises(PlanError) as caught:
        resolve(loaded)
    assert "o.yaml:4:" in str(caught.value)
    assert "o.yaml:3:" in str(caught.value)


def test_module_in_memory_compiles_without_being_changed() -> None:
    from tests.tiny import make_model

    model = make_model("llama_mha")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = parse_spec("graphopt: 1\nsteps:\n  - use: prune_neurons\n    keep: 50%\n", registry=PassRegistry())
    program = graphopt.compile(model, loaded)
    assert program.weights.parameters < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
