"""`recover` in a spec: it trains what its plan says, from the teacher that it names, and the trail tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.compiler.compile import plan_steps
from graphopt.diagnostics import PlanError
from graphopt.ir.text import fingerprint
from graphopt.passkit import PassRegistry
from graphopt.spec import load_spec
from tests.compiler.test_faults import write

CUT = "steps:\n  - use: prune_neurons\n    keep: 50%\n"
RECOVER = (
    "  - use: recover\n    recipe: {steps: 8, batch: 2, seq: 16, rate: 1e-2, warmup: 0}\n"
    "    loss: {next_token: 1.0, logits: {temperature: 2.0}}\n"
)


def test_recover_lowers_its_loss_and_says_so_in_the_trail(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out"
    program = graphopt.compile(None, write(tmp_path, checkpoint, CUT + RECOVER), out=out)
    step = program.trail[-1]
    assert step.edits[0]["edit"] == "train"
    training = step.certificate["training"]
    assert training["loss_last"]["next_token"] < 0.9 * training["loss_first"]["next_token"]
    assert training["steps"] == 8
    assert step.before["parameters"] == step.after["parameters"]
    # Another run gives the same bits, and so does what was saved.
    again = graphopt.compile(None, write(tmp_path, checkpoint, CUT + RECOVER))
    saved = graphopt.load(out)
    for name in program.weights:
        assert torch.equal(program.weights.evaluate(name), again.weights.evaluate(name))
        assert torch.equal(program.weights.evaluate(name), saved.weights.evaluate(name))


def test_planning_trains_nothing(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["graphopt.compiler.compile"], "train", None)
    loaded = load_spec(write(tmp_path, checkpoint, CUT + RECOVER), registry=PassRegistry())
    program = graphopt.capture(checkpoint)
    before = fingerprint(program)
    (_, _), (_, plan) = plan_steps(program, loaded)
    assert fingerprint(program) == before
    assert "8 steps of 2 x 16 tokens" in plan.edits[0].describe()


def test_only_what_surgery_changed_is_trained(tmp_path: Path, checkpoint: Path) -> None:
    body = CUT + RECOVER + "    weights: changed\n"
    program = graphopt.compile(None, write(tmp_path, checkpoint, body))
    cut = graphopt.compile(None, write(tmp_path, checkpoint, CUT))
    moved = {
        name for name in cut.weights if not torch.equal(program.weights.evaluate(name), cut.weights.evaluate(name))
    }
    assert moved
    assert all("mlp" in name for name in moved)
    assert any("as they were loaded" in decline["reason"] for decline in program.trail[-1].declines)


def test_where_and_lora_narrow_what_is_trained(tmp_path: Path, checkpoint: Path) -> None:
    body = CUT + RECOVER + "    lora: {rank: 2}\n    where: {layers: 1}\n"
    program = graphopt.compile(None, write(tmp_path, checkpoint, body))
    cut = graphopt.compile(None, write(tmp_path, checkpoint, CUT))
    moved = {
        name for name in cut.weights if not torch.equal(program.weights.evaluate(name), cut.weights.evaluate(name))
    }
    assert moved
    assert all(".1." in name and "norm" not in name for name in moved)
    reasons = [decline["reason"] for decline in program.trail[-1].declines]
    assert any("outside where" in reason for reason in reasons)
    assert any("no matrices" in reason for reason in reasons)


def test_an_earlier_step_may_teach_and_an_unknown_one_is_refused_without_a_model(
    tmp_path: Path, checkpoint: Path
) -> None:
    body = CUT + "  - use: skip_layers\n    layers: 1\n" + RECOVER + "    teacher: prune_neurons\n"
    program = graphopt.compile(None, write(tmp_path, checkpoint, body))
    assert program.trail[-1].edits[0]["teacher"] == "prune_neurons"
    spec = write(tmp_path, checkpoint, CUT + RECOVER + "    teacher: prune_neuron\n")
    with pytest.raises(PlanError) as caught:
        graphopt.compile("/nowhere", spec)
    assert caught.value.code == "unknown_step"
    assert "prune_neurons" in str(caught.value)


def test_an_interrupted_spec_goes_on_where_it_stopped(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.train import Trainer

    spec = write(tmp_path, checkpoint, CUT + RECOVER)
    whole = graphopt.compile(None, spec)
    true_step, calls = Trainer.step, []

    def stops(self: Trainer) -> dict[str, float]:
        calls.append(self.done)
        if self.done == 5 and len(calls) < 8:
            self.save(tmp_path / "state" / "recover")
            raise KeyboardInterrupt
        return true_step(self)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        graphopt.compile(None, spec, state=tmp_path / "state")
    calls += [-1, -1]
    resumed = graphopt.compile(None, spec, state=tmp_path / "state")
    assert calls[-3:] == [5, 6, 7]
    for name in whole.weights:
        assert torch.equal(whole.weights.evaluate(name), resumed.weights.evaluate(name))
