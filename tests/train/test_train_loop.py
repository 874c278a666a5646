"""The training loop: it learns, leaves alone what is frozen, and does not depend on interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphopt.diagnostics import ArtifactError, PlanError
from graphopt.ir.program import Program
from graphopt.passkit.training import HiddenLoss, LogitsLoss, Lora, Losses, Recipe, Training
from graphopt.spec import ScalarError
from graphopt.train import Trainer, Windows, train
from graphopt.train.data import IGNORED
from graphopt.train.losses import LogitDivergence
from tests.tiny import program

TEXT = torch.randint(3, 96, (7,), generator=torch.Generator().manual_seed(1)).repeat(60)
LOSSES = Losses(next_token=1.0)
RECIPE = Recipe(steps=12, batch=4, seq=16, rate=3e-3, warmup=2)


def matrices(of: Program) -> tuple[str, ...]:
    """Names of all matrices."""
    return tuple(n for n, w in of.weights.weights.items() if w.kind == "parameter" and len(w.expr.shape) == 2)


def asked(of: Program, **changes: object) -> Training:
    """Train all matrices on the text."""
    return replace(Training(matrices(of), LOSSES, RECIPE), **changes)  # type: ignore[arg-type]


def same(a: Program, b: Program, names: tuple[str, ...] | None = None) -> bool:
    """Whether weights are bit-identical."""
    return all(torch.equal(a.weights.evaluate(n), b.weights.evaluate(n)) for n in names or a.weights)


def test_loss_falls_and_frozen_weights_keep_their_bits() -> None:
    base = program("llama_mha")
    trained, record = train(base, asked(base), TEXT)
    assert record.last["loss"] < 0.8 * record.first["loss"]
    frozen = tuple(set(base.weights) - set(matrices(base)))
    assert frozen
    assert same(base, trained, frozen)
    assert not any(same(base, trained, (name,)) for name in matrices(base))
    # The tied head is one tensor under two names and stays so.
    tied = [w for w in trained.weights.weights.values() if w.aliases]
    assert [w.name for w in tied] == [w.name for w in base.weights.weights.values() if w.aliases] != []
    assert record.tokens == 12 * 4 * 16


def test_interrupted_run_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    base = program("gpt2")
    whole, record = train(base, asked(base), TEXT)
    first = Trainer(base, asked(base), TEXT)
    for _ in range(5):
        first.step()
    first.save(tmp_path)
    again, resumed = train(base, asked(base), TEXT, state=tmp_path)
    assert same(whole, again)
    assert resumed.last == record.last
    assert not same(whole, train(base, asked(base, recipe=RECIPE.model_copy(update={"seed": 1})), TEXT)[0])
    assert same(whole, train(base, asked(base), TEXT)[0])
    with pytest.raises(ArtifactError, match="other options"):
        train(base, asked(base, recipe=RECIPE.model_copy(update={"rate": 1e-3})), TEXT, state=tmp_path)


def test_lora_begins_as_identity_and_merges_to_what_it_ran() -> None:
    base = program("llama")
    trainer = Trainer(base, asked(base, lora=Lora(rank=2)), TEXT)
    assert same(base, trainer.result())
    for _ in range(6):
        trainer.step()
    assert sum(t.numel() for t in trainer.leaves.tensors.values()) < base.weights.parameters / 3
    ids = TEXT[:32].reshape(2, 16)
    with torch.no_grad():
        unmerged = trainer.forward(trainer.leaves.current(), {"input_ids": ids})
    merged = trainer.result().module()(input_ids=ids)[0]
    assert torch.equal(merged, unmerged[base.output_nodes[0].name])
    assert not torch.equal(merged, base.module()(input_ids=ids)[0])
    norms = tuple(set(base.weights) - set(matrices(base)))
    with pytest.raises(PlanError, match="LoRA trains matrices"):
        Trainer(base, asked(base, weights=norms[:1], lora=Lora()), TEXT)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    base = program("llama")
    recipe = RECIPE.model_copy(update={"steps": 1, "clip": None})
    whole = Trainer(base, asked(base, recipe=recipe), TEXT)
    parts = Trainer(base, asked(base, recipe=recipe.model_copy(update={"batch": 2, "accumulate": 2})), TEXT)
    whole.step()
    parts.step()
    for name, tensor in whole.leaves.tensors.items():
        other = parts.leaves.tensors[name]
        assert tensor.grad is not None
        assert other.grad is not None
        scale = float(tensor.grad.abs().max())
        assert float((tensor.grad - other.grad).abs().max()) <= 1e-4 * scale, name


def test_distillation_moves_towards_the_teacher() -> None:
    teacher = program("llama")
    generator = torch.Generator().manual_seed(0)
    noisy = teacher.weights
    trainer = Trainer(teacher, asked(teacher), TEXT)
    for name in trainer.leaves.tensors:
        with torch.no_grad():
            tensor = trainer.leaves.tensors[name]
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    student = trainer.result()
    losses = Losses(logits=LogitsLoss(weight=1.0, temperature=2.0), hidden=HiddenLoss(weight=1.0))
    asked_for = asked(student, losses=losses, teacher="original")
    _, record = train(student, asked_for, TEXT, teacher)
    for term in ("logits", "hidden"):
        assert 0 < record.last[term] < 0.7 * record.first[term]
    with torch.no_grad():
        same_model = Trainer(teacher, asked(teacher, losses=losses), TEXT, teacher).losses(TEXT[:32].reshape(2, 16))
    assert float(same_model["hidden"]) == 0
    assert abs(float(same_model["logits"])) < 1e-6
    assert teacher.weights is noisy
    with pytest.raises(PlanError, match="teacher"):
        Trainer(student, asked_for, TEXT)


def test_distillation_counts_what_is_to_be_predicted() -> None:
    """Only positions in front of a wanted token are compared where some are ignored; otherwise all are."""
    torch.manual_seed(0)
    ours, theirs, ids = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    term = LogitDivergence(1.0, ("a",), ("b",), 1.0)
    wanted = ids.clone()
    wanted[:, [0, 1, 3]] = IGNORED
    only = term(wanted, {"a": ours}, {"b": theirs})
    apart = theirs.clone()
    apart[:, [0, 2, 3]] = 9.0
    torch.testing.assert_close(term(wanted, {"a": ours}, {"b": apart}), only)
    torch.testing.assert_close(term(ids[:, 1:2], {"a": ours[:, 1:2]}, {"b": theirs[:, 1:2]}), only)


def test_text_is_a_function_of_step_and_seed_and_covers_everything() -> None:
    text = torch.arange(1000)
    windows = Windows(text, 4, 16, seed=3)
    again = Windows(text, 4, 16, seed=3)
    later = [again[i] for i in (40, 7, 0)]
    assert all(torch.equal(windows[i], batch) for i, batch in zip((40, 7, 0), later, strict=True))
    epoch = torch.cat([windows[i] for i in range(windows.per_epoch)]).flatten()
    assert len(epoch.unique()) == len(epoch) > 900
    assert not torch.equal(windows[0], Windows(text, 4, 16, seed=4)[0])
    with pytest.raises(PlanError, match="does not hold a batch"):
        Windows(text, 100, 16)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedules_rise_and_end_at_their_floor(schedule: str, last: float) -> None:
    from graphopt.train.schedule import factor

    recipe = Recipe(steps=100, warmup=10, schedule=schedule, floor=0.1)  # type: ignore[arg-type]
    rates = [factor(recipe, step) for step in range(101)]
    assert rates[0] == 0.1
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(last)


def test_what_cannot_be_trained_is_refused() -> None:
    base = program("llama")
    with pytest.raises(PlanError, match="no weight is selected"):
        Trainer(base, asked(base, weights=()), TEXT)
    with pytest.raises(PlanError, match="no draft heads"):
        Trainer(base, asked(base, losses=Losses.model_validate({"heads": {"weight": 1.0}})), TEXT)
    with pytest.raises((ScalarError, ValueError), match="weight 0"):
        Losses()
    trainer = Trainer(base, asked(base), TEXT)
    next(iter(trainer.leaves.tensors.values())).data.mul_(float("inf"))
    with pytest.raises(PlanError, match="smaller rate"):
        trainer.step()
