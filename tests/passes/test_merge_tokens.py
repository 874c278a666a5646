"""merge_tokens: alike tokens become their mean, by pairs and by windows, and predictors of drop_tokens learn."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.tokens.drop_tokens import DropTokens
from graphopt.passes.tokens.merge_tokens import MergeTokens
from graphopt.passkit import Context, Pass
from graphopt.passkit.edits import Plan, apply_edits
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.train import train
from graphopt.views import Views
from tests.pictures import classifier_program, reader_program

MODEL = Shape(layers=2, heads=2, kv_heads=2, head_dim=4, hidden=8, neurons=6, vocabulary=11, positions="rotary")


def planned(config: Pass, program: Program) -> tuple[Plan, Program]:
    views = Views(program)
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    return plan, apply_edits(program, views, plan.edits) if plan.edits else program


PLACES: list[tuple[str, dict[str, Any]]] = [
    ("classifier", {"span": "patches", "layers": 1, "keep": "60%"}),
    ("classifier", {"span": "patches", "layers": [0, 2], "keep": [10, 4], "by": {"kind": "pairs"}}),
    ("classifier", {"span": "patches", "layers": 1, "keep": 7, "by": {"kind": "windows", "size": 2}}),
    ("reader", {"span": "patches", "layers": 1, "keep": 10, "by": {"kind": "windows", "size": 2}}),
    ("reader", {"span": "image", "layers": 2, "keep": "50%"}),
]
# The law of costs names no sizes for pictures in a text; the tests of drop_tokens count them.
COUNTED = [(law, *place) for law in ("surgery_equals_emulation", "runs_at_other_shapes") for place in PLACES] + [
    ("cost_is_counted", *place) for place in PLACES if place[0] == "classifier"
]


@pytest.mark.parametrize(("law", "model", "options"), COUNTED)
def test_laws(law: str, model: str, options: dict[str, Any]) -> None:
    program = {"classifier": classifier_program, "reader": reader_program}[model]()
    LAWS[law](MergeTokens.model_validate_json(json.dumps(options)), program)


def test_equal_tokens_become_one_and_nothing_is_lost() -> None:
    x = torch.randn(2, 3, 4)
    doubled = torch.cat([x, x], 1)
    target = torch.tensor([[True] * 3 + [False] * 3] * 2)
    made = torch.ops.graphopt.merge_tokens(doubled, target, ~target)
    torch.testing.assert_close(made[:, :3], x)


def test_means_keep_the_sum() -> None:
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    target = torch.tensor([[True, False, True, False, False, False]])
    gone = torch.tensor([[False, True, False, True, False, False]])
    made = torch.ops.graphopt.merge_tokens(x, target, gone)
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    chosen = [max((0, 2), key=lambda j, i=i: float(unit[i] @ unit[j])) for i in (1, 3)]
    counts = {j: 1 + chosen.count(j) for j in (0, 2)}
    torch.testing.assert_close(sum(made[0, j] * n for j, n in counts.items()), x[0, [0, 1, 2, 3]].sum(0))
    assert torch.equal(made[0, 4:], x[0, 4:])


def test_uniform_windows_go_first() -> None:
    """A 4 x 4 grid behind one token: the one window of equal tokens loses all but its first."""
    x = torch.randn(1, 17, 8)
    inside = [1 + i for i in (2, 3, 6, 7)]
    x[:, inside] = x[:, inside[:1]]
    score = torch.ops.graphopt.window_scores(x, 1, 4, 4, 2)
    span = torch.arange(17)[None] > 0
    stays = torch.ops.graphopt.top_tokens(score, span, torch.tensor([13]))
    assert [i for i in range(1, 17) if not stays[0, i]] == inside[1:]
    made = torch.ops.graphopt.merge_windows(x, span & ~stays, 1, 4, 4, 2)
    torch.testing.assert_close(made, x)
    whole = torch.ops.graphopt.top_tokens(score, span, torch.tensor([4]))
    assert [i for i in range(1, 17) if whole[0, i]] == [1, 3, 9, 11]
    made = torch.ops.graphopt.merge_windows(x, span & ~whole, 1, 4, 4, 2)
    torch.testing.assert_close(made[0, 1], x[0, [1, 2, 5, 6]].mean(0))


@pytest.mark.parametrize(
    ("span", "options", "words"),
    [
        ("patches", {"keep": 3, "by": {"kind": "windows", "size": 2}}, "has 4 windows"),
        ("image", {"keep": 3}, "one batch of tokens"),
    ],
)
def test_what_cannot_be_merged_is_declined(span: str, options: dict[str, Any], words: str) -> None:
    plan, _ = planned(
        MergeTokens.model_validate_json(json.dumps({"span": span, "layers": 1, **options})), classifier_program()
    )
    assert not plan.edits
    assert any(words in decline.reason for decline in plan.declines)


def test_text_has_no_windows() -> None:
    with pytest.raises(ValidationError, match="no grid of windows"):
        MergeTokens.model_validate_json(json.dumps({"span": "text", "layers": 1, "keep": "50%", "by": "windows"}))


def test_a_predictor_learns_and_nothing_else_moves() -> None:
    """Its own three tensors are trained, all others keep their bits, and the loss falls."""
    options = {"span": "text", "layers": 1, "keep": "50%", "score": {"kind": "predictor", "width": 8}}
    recipe = {"steps": 60, "batch": 8, "seq": 16, "rate": 0.02, "warmup": 0}
    config = DropTokens.model_validate_json(json.dumps({**options, "recipe": recipe}))
    program = build(MODEL)
    plan, after = planned(config, program)
    assert plan.training is not None
    assert plan.training.weights == tuple(f"layers.1.tokens.{name}" for name in ("up.weight", "up.bias", "down.weight"))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 6, (2000,), generator=generator)
    trained, record = train(after, plan.training, words)
    moved = [
        name for name in after.weights if not torch.equal(after.weights.evaluate(name), trained.weights.evaluate(name))
    ]
    assert set(moved) == set(plan.training.weights)
    # Batches differ by more than what is learnt: the first one again, with what the first training left.
    _, again = train(trained, plan.training, words)
    assert again.first["loss"] < record.first["loss"]


def test_the_gate_of_a_predictor_changes_no_bit() -> None:
    """What passes the gradient on is a factor of exactly one."""
    options = {"span": "text", "layers": 1, "keep": "50%", "score": {"kind": "predictor", "width": 8}, "recipe": None}
    config = DropTokens.model_validate_json(json.dumps(options))
    LAWS["surgery_equals_emulation"](config, build(MODEL))
    _, after = planned(config, build(MODEL))
    gate = next(node for node in after.graph.graph.nodes if node.target is torch.ops.aten.detach.default)
    (difference,) = gate.users
    rewriter = Rewriter(after)
    rewriter.add_output("difference", rewriter.node(difference))
    with torch.no_grad():
        found = rewriter.finish().module()(input_ids=torch.randint(0, 11, (2, 9)))[-1]
    assert torch.equal(found, torch.zeros_like(found))
