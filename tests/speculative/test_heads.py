"""Draft heads: inserted without effect, trained alone, saved, and never wrong, whatever they guess."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import Plan, apply_edits
from graphopt.passkit.training import HeadsLoss, Losses, Recipe, Training
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate import Fixed, Speculator, widths
from graphopt.runtime.speculate.heads import Heads, split
from graphopt.train import train
from graphopt.views import Views
from tests.compiler.test_faults import write
from tests.speculative.models import decoder, insert_cache
from tests.tiny import program, tokens

PROMPT = tokens(1, 5, seed=3)[0]


@cache
def planned(name: str, **options: object) -> tuple[Plan, Program]:
    """A tiny model with untrained heads."""
    base, views = program(name), Views(program(name))
    plan = PassRegistry().get("insert_heads").model_validate({"heads": 3, **options}).plan(Context(views, (0, 1, 2)))
    return plan, apply_edits(base, views, plan.edits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "llama_mha"])
@pytest.mark.parametrize("options", [{}, {"output": "shared", "layers": 2}, {"kind": "hydra", "layers": 2}], ids=str)
def test_inserted_heads_change_no_bit_and_repeat_the_logits(name: str, options: dict[str, object]) -> None:
    plan, after = planned(name, **options)
    ids = tokens(2, 9)
    expected = program(name).module()(input_ids=ids)[0]
    got = after.module()(input_ids=ids)
    assert after.entry.outputs == ("logits", "hidden", "heads.1", "heads.2", "heads.3")
    assert torch.equal(got[0], expected)
    assert all(torch.equal(head, expected) for head in got[2:])
    training = plan.training
    assert training is not None
    assert set(training.weights) == set(after.weights) - set(program(name).weights)
    trunk, heads = split(after)
    assert set(trunk.weights) == set(program(name).weights)
    assert torch.equal(trunk.module()(input_ids=ids)[0], expected)
    assert len(heads) == 3


def test_a_head_of_hydra_depends_on_the_path_and_one_of_medusa_does_not() -> None:
    _, after = planned("llama", kind="hydra")
    noise = torch.Generator().manual_seed(0)
    weights = {n: after.weights.evaluate(n) for n in after.weights if n.startswith("heads.")}
    run = after.module()
    names = [node.meta["weight"] for node in after.graph.graph.nodes if "weight" in node.meta]
    for name, value in weights.items():
        run.values[names.index(name)] = value + 0.1 * torch.randn(value.shape, generator=noise)  # type: ignore[attr-defined]
    ids, ahead = tokens(1, 4), tokens(4, 3, seed=2).reshape(1, 4, 3)
    changed = ahead.clone()
    changed[..., 1] += 1
    one, other = run(input_ids=ids, ahead=ahead), run(input_ids=ids, ahead=changed)
    assert torch.equal(one[2], other[2])
    assert not torch.equal(one[3], other[3])
    assert not torch.equal(one[4], other[4])
    # Left out, the tokens ahead are those of the text itself.
    text = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    own = torch.stack([text[:, i + 1 : i + 4] for i in range(4)], dim=1)
    assert torch.equal(run(input_ids=ids)[4], run(input_ids=ids, ahead=own)[4])
    assert not any(spec.role == "ahead" for spec in planned("llama")[1].entry.inputs)


@pytest.mark.parametrize("target", ["text", "base"])
def test_every_head_learns_its_own_place(target: str) -> None:
    """A text that repeats one cycle is known at any distance: a head that aimed one place off could not learn it."""
    plan, after = planned("llama")
    assert plan.training is not None
    cycle = torch.tensor([5, 11, 17, 29, 41, 53, 67]).repeat(120)
    recipe = Recipe(steps=60, batch=4, seq=20, rate=2e-2, warmup=5)
    base = after
    if target == "base":
        base_weights = tuple(n for n in program("llama").weights if "rotary" not in n and "inv_freq" not in n)
        asked = Training(base_weights, Losses(next_token=1.0), recipe.model_copy(update={"rate": 1e-2}))
        base, _ = train(after, asked, cycle)
    losses = Losses(heads=HeadsLoss(target=target, decay=1.0))  # type: ignore[arg-type]
    trained, record = train(base, Training(plan.training.weights, losses, recipe), cycle)
    assert record.last["heads"] < 0.1 * record.first["heads"]
    got = trained.module()(input_ids=cycle[None, :20])
    for k in (1, 2, 3):
        assert torch.equal(got[1 + k][0, :15].argmax(-1), cycle[k + 1 : k + 16])
    assert torch.equal(got[0], base.module()(input_ids=cycle[None, :20])[0])


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("gemma2", {"kind": "hydra"})])
def test_drafts_of_heads_change_no_token(name: str, options: dict[str, object]) -> None:
    _, after = planned(name, **options)
    trunk, heads = split(after)
    run = Decoder(insert_cache(trunk), torch.float64)
    wanted, _ = Speculator(decoder(name)).generate(PROMPT, 20)
    drafters = [Heads(heads, torch.float64, ranks=3, width=2)]
    if not options:
        drafters.append(Heads(heads, torch.float64, template=widths((3, 2, 1))))
    for drafter in drafters:
        for budget in (2, 5, 12):
            got, log = Speculator(run, drafter, Fixed(budget)).generate(PROMPT, 20)
            assert torch.equal(got, wanted)
            assert max(event.rows for event in log.steps) <= budget
            assert max(event.rows for event in log.steps) > 1


def test_a_spec_inserts_and_trains_and_what_is_saved_drafts_alike(tmp_path: Path, checkpoint: Path) -> None:
    body = (
        "steps:\n  - use: insert_heads\n    kind: hydra\n    heads: 2\n    output: shared\n"
        "    recipe: {steps: 6, batch: 2, seq: 16, rate: 1e-2, warmup: 0}\n"
    )
    out = tmp_path / "out"
    made = graphopt.compile(None, write(tmp_path, checkpoint, body), out=out)
    step = made.trail[-1]
    assert step.effect == "untrained"
    assert step.certificate["largest_relative_error"] == 0
    assert step.certificate["training"]["loss_last"]["heads"] < step.certificate["training"]["loss_first"]["heads"]
    assert step.after["perplexity"] == step.before["perplexity"]
    loaded = graphopt.load(out)
    ids = torch.arange(1, 11)[None]
    for mine, other in zip(made.module()(input_ids=ids), loaded.module()(input_ids=ids), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(made.module()(input_ids=ids)[0], graphopt.capture(checkpoint).module()(input_ids=ids)[0])
    again = PassRegistry().get("insert_heads")().plan(Context(Views(made), (0, 1)))
    assert "already" in again.declines[0].reason


def test_decoding_with_heads_that_read_tokens_to_come_is_refused() -> None:
    _, after = planned("llama", kind="hydra", heads=2)
    cached = insert_cache(after)
    with pytest.raises(PlanError, match="read tokens that are not there yet"):
        Decoder(cached)
