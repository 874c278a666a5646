"""drop_tokens: what stays, what it costs, and that nobody sees what has left."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sympy
import torch
from pydantic import ValidationError

from graphopt.compiler.verify import random_inputs
from graphopt.cost import cost
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.passes.tokens.drop_tokens import DropTokens
from graphopt.passkit import Context
from graphopt.passkit.edits import apply_edits
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.views import Views
from tests.pictures import ENTRIES, IMAGE, classifier_program, question, reader_program

BY_LAST = {"kind": "attention", "of": "last", "at": "next"}
TEXT = Shape(layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8, neurons=6, positions="rotary")


def step(**options: Any) -> DropTokens:
    return DropTokens.model_validate_json(json.dumps(options))


def after(program: Program, **options: Any) -> Program:
    views = Views(program)
    plan = step(**options).plan(Context(views, tuple(range(len(views.blocks)))))
    assert plan.edits, [decline.reason for decline in plan.declines]
    return apply_edits(program, views, plan.edits)


def wide(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pyramid": ("reader", {"span": "image", "layers": [1, 2, 3], "keep": ["50%", "25%", "12.5%"], "score": BY_LAST}),
    "by text, renumbered": (
        "reader",
        {
            "span": "image",
            "layers": 2,
            "keep": 4,
            "score": {"kind": "attention", "of": "text"},
            "positions": "renumber",
        },
    ),
    "merged twice": (
        "reader",
        {"span": "image", "layers": [0, 2], "keep": "50%", "score": "similarity", "action": "merge"},
    ),
    "in the encoder": ("reader", {"span": "patches", "layers": 1, "keep": 5, "score": "norm"}),
    "by class token": (
        "classifier",
        {"span": "patches", "layers": [1, 2], "keep": "50%", "score": {"kind": "attention", "of": "class"}},
    ),
    "by chance": (
        "classifier",
        {"span": "patches", "layers": 0, "keep": "25%", "score": {"kind": "random", "seed": 3}},
    ),
}


def program_of(name: str) -> Program:
    return {"reader": reader_program, "classifier": classifier_program}[name]()


@pytest.mark.parametrize("law", ["surgery_equals_emulation", "plan_is_complete", "runs_at_other_shapes"])
@pytest.mark.parametrize("case", CASES)
def test_laws_hold_where_pictures_are(case: str, law: str) -> None:
    name, options = CASES[case]
    LAWS[law](step(**options), program_of(name))


def test_what_has_left_is_never_seen() -> None:
    """Another picture behind the tokens that left changes nothing: their entries reach no result."""
    program = after(build(TEXT), span="text", layers=1, keep="25%", score={"kind": "random", "seed": 1})
    runner = program.module(torch.float64)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 4]])
    with torch.no_grad():
        base = runner(input_ids=ids)[0]
    left = [i for i in range(1, 9) if bool((base[0, i] == 0).all())]
    assert len(left) == 6
    # In front of the stage tokens still meet; a program that drops in front of the first layer never reads them at all.
    first = after(build(TEXT), span="text", layers=0, keep="25%", score={"kind": "random", "seed": 1}).module()
    other = ids.clone()
    other[0, left] = (other[0, left] + 1) % 5
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids)[0], first(input_ids=other)[0])


def test_positions_stay_or_move_up() -> None:
    """With renumbered positions the tokens that stay are a shorter text; with kept ones they are not."""
    whole = build(TEXT)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 4]])
    options = {"span": "text", "layers": 0, "keep": "25%", "score": {"kind": "random", "seed": 1}}
    with torch.no_grad():
        kept = after(whole, **options).module(torch.float64)(input_ids=ids)[0]
        moved = after(whole, **options, positions="renumber").module(torch.float64)(input_ids=ids)[0]
        stays = [i for i in range(10) if bool((kept[0, i] != 0).any())]
        alone = whole.module(torch.float64)(input_ids=ids[:, stays])[0]
    torch.testing.assert_close(moved[:, stays], alone)
    assert (kept[:, stays[-1]] - alone[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["reader", "classifier"])
def test_two_steps_are_two_stages(name: str) -> None:
    """A step on what another has left keeps shares of the same whole, so that both together are one step."""
    options: dict[str, Any] = {"span": {"reader": "image", "classifier": "patches"}[name], "score": "norm"}
    program = program_of(name)
    together = after(program, **options, layers=[1, 2], keep=["50%", "25%"])
    apart = after(after(program, **options, layers=1, keep="50%"), **options, layers=2, keep="25%")
    given = wide(question(2) if name == "reader" else {"pixel_values": torch.randn(2, 1, 16, 16)})
    with torch.no_grad():
        one, other = (each.module(torch.float64)(**given)[0] for each in (together, apart))
    torch.testing.assert_close(one, other)
    assert cost(together).flops == cost(apart).flops or name == "reader"


def test_a_predictor_learns_by_what_values_give() -> None:
    """The gradient of a score is that of the share of the token's values in what later attention reads."""
    program = after(reader_program(), span="image", layers=2, keep="25%", score={"kind": "predictor", "width": 4})
    runner: Any = program.module(torch.float64)
    names = [node.meta["weight"] for node in program.graph.graph.nodes if "weight" in node.meta]
    place = next(i for i, name in enumerate(names) if name.endswith("tokens.down.weight"))
    weight = runner.values[place] = runner.values[place].detach().clone().requires_grad_()
    given = wide(question(2))
    result = runner(**given)[0]
    result.square().mean().backward()
    assert weight.grad.abs().max() > 1e-6 * float(result.detach().square().mean())
    runner.values[place] = weight.detach()
    with torch.no_grad():
        assert torch.equal(runner(**given)[0], result)


def test_what_leaves_the_encoder_leaves_the_text() -> None:
    program = after(reader_program(), span="patches", layers=1, keep=5, score="norm")
    given = question(2)
    with torch.no_grad():
        stays = (program.module()(**given)[0] != 0).any(-1)
    assert (stays[:, 3 : 3 + ENTRIES].sum(1) == 5).all()
    assert bool(stays[:, :3].all() and stays[:, 3 + ENTRIES :].all())
    further = after(program, span="image", layers=2, keep=2, score={"kind": "attention", "of": "text"})
    with torch.no_grad():
        fewer = (further.module()(**given)[0] != 0).any(-1)
    assert (fewer.sum(1) == 6 + 2).all()
    assert bool((stays | ~fewer).all())


def test_padding_changes_no_real_token() -> None:
    program = after(reader_program(), **CASES["pyramid"][1])
    given = wide(question(1))
    runner = program.module(torch.float64)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 5, dtype=torch.int64), given["input_ids"]], 1),
        "pixel_values": given["pixel_values"],
    }
    mask = (torch.arange(padded["input_ids"].shape[1]) >= 5).to(torch.int64)[None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = runner(**given)[0]
        beside = runner(**padded, attention_mask=mask, position_ids=places)[0]
    torch.testing.assert_close(beside[:, 5:], alone)


def test_rows_of_unequal_pictures_need_padding() -> None:
    runner = after(reader_program(), span="image", layers=1, keep="50%", score="norm").module(torch.float64)
    one, two = wide(question(1)), wide(question(1, seed=1))
    text = torch.full((1, ENTRIES), 7)
    both = {
        "input_ids": torch.cat([one["input_ids"], torch.cat([two["input_ids"][:, :6] % 80, text], 1)]),
        "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]),
    }
    both["input_ids"][1][both["input_ids"][1] == IMAGE] = 5
    with pytest.raises(ValueError, match="row 1 keeps 22 of 22 tokens"):
        runner(**both)
    mask = torch.ones(2, 22, dtype=torch.int64)
    mask[1, :8] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = runner(**both, attention_mask=mask, position_ids=places)[0]
        alone = runner(**one)[0]
    torch.testing.assert_close(got[:1], alone)
    assert bool((got[1, 8:] != 0).any(-1).all())


def test_several_pictures_share_what_stays() -> None:
    program = after(reader_program(), span="image", layers=1, keep="25%", score="norm")
    ids = question(1, text=8)["input_ids"]
    ids = torch.cat([ids, ids], 1)
    pixels = torch.cat([question(1)["pixel_values"], 5 * question(1, seed=1)["pixel_values"]])
    with torch.no_grad():
        got = program.module()(input_ids=ids, pixel_values=pixels)[0]
    stays = (got[0] != 0).any(-1)
    assert int(stays[ids[0] == IMAGE].sum()) == 2 * ENTRIES // 4
    assert bool(stays[ids[0] != IMAGE].all())


def test_text_without_pictures_passes_whole() -> None:
    program, whole = after(reader_program(), **CASES["pyramid"][1]), reader_program()
    ids = question(2)["input_ids"][:, :3]
    with torch.no_grad():
        assert torch.equal(program.module()(input_ids=ids)[0], whole.module()(input_ids=ids)[0])


SCORES: tuple[Any, ...] = (
    "norm",
    "similarity",
    {"kind": "random"},
    {"kind": "predictor", "width": 4},
    *({"kind": "attention", "of": of, "at": at} for of in ("all", "last", "text") for at in ("before", "next")),
)


@pytest.mark.parametrize("keep", ["100%", 16])
@pytest.mark.parametrize("action", ["drop", "merge"])
@pytest.mark.parametrize("score", SCORES, ids=str)
def test_keeping_all_is_no_edit(score: Any, action: str, keep: object) -> None:
    """With everything kept the program stays as it is, bit for bit."""
    views = Views(reader_program())
    plan = step(span="image", layers=[1, 2], keep=[keep, keep], score=score, action=action).plan(Context(views, (0,)))
    assert not plan.edits
    assert {decline.candidate for decline in plan.declines} == {block.path for block in views.blocks}


def test_cost_is_a_formula_in_the_share_that_stays() -> None:
    """Layers behind the stage cost S - P + floor(P / 4) tokens each, in FLOPs as in KV bytes."""
    whole = reader_program()
    less = after(whole, span="image", layers=2, keep="25%", score="norm")
    b, s, i = (sympy.Symbol(name, positive=True, integer=True) for name in ("B", "S", "I"))
    before, behind = cost(whole), cost(less)
    kept = s - ENTRIES * (i // b) + (ENTRIES * (i // b)) // 4
    per_token = before.kv_bytes_per_token
    wanted = b * per_token * (s + kept) / 2
    for sizes in ({b: 1, s: 40, i: 1}, {b: 3, s: 100, i: 6}, {b: 2, s: 9, i: 0}):
        at = {str(symbol): value for symbol, value in sizes.items()}
        assert behind.at(**at)["kv_bytes"] == wanted.subs(sizes)
        flops = before.flops.subs(sizes), before.flops.subs({**sizes, s: kept.subs(sizes)})
        vision = before.flops.subs({**sizes, s: 0})
        assert behind.at(**at)["flops"] == _halves(before, sizes, s, kept.subs(sizes)), (flops, vision)


def _halves(before: Any, sizes: dict[Any, int], s: Any, kept: Any) -> Any:
    """Two of four layers at S tokens, two and the head at `kept`, and what lies in front of them."""
    parts = before.breakdown
    text = [block for block in parts.blocks if block.flops.has(s)]
    total = sum(block.flops.subs(sizes) for block in parts.blocks if not block.flops.has(s))
    total += sum(part.flops.subs(sizes) for part in parts.outside if not part.flops.has(s))
    head = [part for part in parts.outside if part.flops.has(s)]
    total += sum(block.flops.subs(sizes) for block in text[:2])
    return total + sum(part.flops.subs({**sizes, s: kept}) for part in (*text[2:], *head))


@pytest.mark.parametrize("case", ["pyramid", "merged twice", "in the encoder"])
def test_counted_flops_are_those_of_the_run(case: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from graphopt.testing.laws import _FLOPS

    program = after(reader_program(), **CASES[case][1])
    given = random_inputs(program, {"B": 2, "S": 9}, 0)
    given = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    runner = program.module(None)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as mode:
        runner(**given)
    assert cost(program).at(B=2, S=9 + ENTRIES, I=2)["flops"] == mode.get_total_flops()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"span": "image", "layers": 1, "keep": 3, "score": {"kind": "attention", "of": "class"}}, "no class token"),
        ({"span": "text", "layers": 1, "keep": 3}, "keep a share"),
        ({"span": "image", "layers": 1, "keep": "50%", "last": 2}, "reads last only with span: text"),
        ({"span": "image", "layers": 1, "keep": "150%"}, "more than 100%"),
        ({"span": "patches", "layers": 1, "keep": "50%", "past": "drop"}, "patches have no past"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        step(**options)


@pytest.mark.parametrize(
    ("keep", "words"),
    [(["50%"], "1 amounts for 2 layers"), (["25%", "50%"], "layer 2 would keep 50%, layer 1 before it 25%")],
)
def test_amounts_that_do_not_fit_are_refused(keep: list[str], words: str) -> None:
    views = Views(reader_program())
    with pytest.raises(PlanError, match=words):
        step(span="image", layers=[1, 2], keep=keep).plan(Context(views, (0,)))


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (build(TEXT), {"span": "image"}, "no picture is written"),
        (build(TEXT), {"span": "patches"}, "no stack of layers begins with the patches"),
        (
            build(Shape(kind="vision")),
            {"span": "patches", "score": {"kind": "attention", "of": "class"}},
            "class token",
        ),
        (
            build(Shape(layers=2, window=3)),
            {"span": "text", "score": {"kind": "attention", "of": "all"}, "layers": 1},
            "has a window",
        ),
        (build(Shape(layers=2, window=3)), {"span": "text", "positions": "renumber"}, "without windows"),
        (build(TEXT), {"span": "text", "score": {"kind": "attention", "of": "all"}}, "use at: next"),
    ],
)
def test_programs_without_such_tokens_are_declined(program: Program, options: dict[str, Any], words: str) -> None:
    views = Views(program)
    plan = step(**{"layers": 0, "keep": "50%", **options}).plan(Context(views, (0,)))
    assert not plan.edits
    assert any(words in decline.reason for decline in plan.declines), plan.declines
