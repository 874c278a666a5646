"""What skip_layers decides, on models of our own that capture in a moment: which layers, why, and what it refuses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graphopt.compiler.verify import random_inputs
from graphopt.diagnostics import PlanError
from graphopt.observe import observe
from graphopt.passes.depth.formula import evenly, reserved
from graphopt.passes.depth.skip_layers import SkipLayers
from graphopt.passkit import Context, Effect, Fact, Plan, Skip
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.spec import ScalarError
from graphopt.testing.models import Shape, build
from graphopt.views import Views


@cache
def views(layers: int = 5, **values: Any) -> Views:
    return Views(build(Shape(layers=layers, **values)))


def planned(v: Views, where: tuple[int, ...] | None = None, paths: tuple[str, ...] = (), **fields: Any) -> Plan:
    config = SkipLayers.model_validate(fields)
    context = Context(v, tuple(range(len(v.blocks))) if where is None else where, paths=paths)
    taps = config.observe(context)
    batches = [random_inputs(v.program, {"B": 2, "S": 9}, 0)]
    return config.plan(Context(v, context.layers, observe(v.program, taps, batches) if taps else None, paths=paths))


def taken(plan: Plan) -> list[int]:
    return [edit.index for edit in plan.edits if isinstance(edit, Skip)]


def reasons(plan: Plan) -> dict[str, str]:
    return {decline.candidate: decline.reason for decline in plan.declines}


def refusal(v: Views, where: tuple[int, ...] | None = None, **fields: Any) -> PlanError:
    with pytest.raises(PlanError) as caught:
        planned(v, where, **fields)
    return caught.value


@pytest.mark.parametrize(
    ("layers", "speedup", "upstream", "linspace"),
    [
        (10, 2, (0, 2, 4, 6, 9), (0, 2, 5, 7, 9)),
        (7, 2, (0, 3, 6), (0, 3, 6)),
        (9, 2, (0, 3, 6, 8), (0, 3, 5, 8)),
        (12, 1.5, (0, 1, 2, 3, 4, 5, 6, 11), (0, 2, 3, 5, 6, 8, 9, 11)),
        (4, 2, (0, 3), (0, 3)),
        (6, 1, (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
        (5, 0.5, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)),
    ],
)
def test_layers_that_stay(layers: int, speedup: float, upstream: tuple[int, ...], linspace: tuple[int, ...]) -> None:
    assert reserved(layers, speedup) == reserved(layers, speedup, "upstream") == upstream
    assert reserved(layers, speedup, "linspace") == linspace


def test_too_few_layers_to_stay() -> None:
    with pytest.raises(ValueError, match="5 layers / 3 leaves 1, fewer than the first and the last"):
        reserved(5, 3)
    assert reserved(5, 3, "linspace") == reserved(5, 100, "linspace") == (0, 4)


@pytest.mark.parametrize(
    ("layers", "remove", "gone"),
    [
        (5, 0, ()),
        (5, 1, (2,)),
        (5, 2, (1, 3)),
        (5, 3, (1, 2, 3)),
        (8, 3, (1, 3, 6)),
        (9, 4, (1, 3, 5, 7)),
        (6, 2, (1, 4)),
    ],
)
def test_layers_that_go_evenly(layers: int, remove: int, gone: tuple[int, ...]) -> None:
    assert evenly(layers, remove) == gone


def test_named_layers() -> None:
    plan = planned(views(), layers=[1, -1])
    assert taken(plan) == [1, 4]
    assert next(edit.to_json() for edit in plan.edits)["why"] == "named"
    assert reasons(plan) == {f"layers.{i}": "not among layers" for i in (0, 2, 3)}
    assert plan.notes == {}


def test_speedup_says_what_runs() -> None:
    plan = planned(views(), speedup=2.5)
    assert taken(plan) == [1, 2, 3]
    assert {edit.why for edit in plan.edits if isinstance(edit, Skip)} == {"speedup 2.5"}
    assert set(reasons(plan).values()) == {"runs at speedup 2.5"}
    assert taken(planned(views(), speedup=1.6, spacing="linspace")) == [1, 3]
    assert taken(planned(views(), speedup=1)) == []


def test_speedup_that_cannot_be() -> None:
    error = refusal(views(), speedup=4)
    assert error.code == "too_few_layers"
    assert "cannot make 5 layers 4 times faster" in str(error)
    assert error.notes == ("int(5 / 4) is 1, and the first and last stay",)
    assert error.diagnostics[0].help == ("use a speedup of at most 2.5, or spacing: linspace",)
    assert taken(planned(views(), speedup=4, spacing="linspace")) == [1, 2, 3]


def test_last_and_evenly() -> None:
    plan = planned(views(), remove=2, choose="last")
    assert taken(plan) == [3, 4]
    assert {edit.why for edit in plan.edits if isinstance(edit, Skip)} == {"last"}
    assert set(reasons(plan).values()) == {"not among the 2 chosen last"}
    plan = planned(views(), (0, 1, 3), remove=1, choose="last")
    assert taken(plan) == [3]
    assert reasons(plan)["layers.2"] == reasons(plan)["layers.4"] == "outside where"
    plan = planned(views(), remove=2, choose="evenly")
    assert taken(plan) == [1, 3]
    assert set(reasons(plan).values()) == {"not among the 2 chosen evenly"}
    # Evenly among the layers that where selects, not by their numbers.
    assert taken(planned(views(), (0, 3, 4), remove=1, choose="evenly")) == [3]
    assert taken(planned(views(), remove=3, choose="evenly")) == [1, 2, 3]


def test_paths_select_layers_too() -> None:
    plan = planned(views(), paths=("layers.1", "layers.3"), remove=1, choose="last")
    assert taken(plan) == [3]
    assert [name for name, reason in reasons(plan).items() if reason == "outside where"] == [
        "layers.0",
        "layers.2",
        "layers.4",
    ]


def quiet(index: int) -> Views:
    """A model in which one layer adds next to nothing."""
    from graphopt.ir.rewriter import Rewriter
    from graphopt.ir.weights import Affine

    rewriter = Rewriter(build(Shape(layers=4)))
    for name in (f"layers.{index}.attention.o.weight", f"layers.{index}.feed_forward.down.weight"):
        rewriter.set_weight(name, lambda expr: Affine(expr, 1e-3))
    return Views(rewriter.finish())


def test_influence_is_one_minus_the_cosine() -> None:
    v = quiet(2)
    plan = planned(v, remove=1)
    assert taken(plan) == [2]
    influence = plan.notes["influence"]
    assert list(influence) == ["0", "1", "2", "3"]
    batch = random_inputs(v.program, {"B": 2, "S": 9}, 0)
    stream = [v.blocks[0].entry, *(block.exit for block in v.blocks)]
    from graphopt.ir.rewriter import Rewriter

    rewriter = Rewriter(v.program)
    output = next(iter(reversed(rewriter.graph.nodes)))
    output.args = (tuple(rewriter.node(node) for node in stream),)
    seen = torch.fx.GraphModule(torch.nn.Module(), rewriter.graph)(
        *(v.program.weights.evaluate(name) for name in v.program.weight_nodes), batch["input_ids"]
    )
    for index in range(4):
        before, after = seen[index].flatten(0, 1), seen[index + 1].flatten(0, 1)
        cosine = float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())
        assert influence[str(index)] == pytest.approx(1 - cosine, abs=1e-5)
    edit = plan.edits[0]
    assert isinstance(edit, Skip)
    assert edit.why == f"influence {influence['2']:.4g}"
    assert reasons(plan)["layers.0"] == f"influence {influence['0']:.4g} is not among the 1 lowest"
    two = planned(v, remove=2)
    second = min((value, int(index)) for index, value in influence.items() if index != "2")[1]
    assert taken(two) == sorted([2, second])
    assert taken(planned(v, (0, 1, 3), remove=1)) == [second]


def test_what_is_observed() -> None:
    v = views()
    context = Context(v, (1, 3))
    taps = SkipLayers(remove=1).observe(context)
    assert [(tap.node, tap.other) for tap in taps] == [(v.blocks[i].exit.name, v.blocks[i].entry.name) for i in (1, 3)]
    for idle in ({"layers": [1]}, {"speedup": 2}, {"remove": 1, "choose": "last"}, {"remove": 1, "choose": "evenly"}):
        assert SkipLayers.model_validate(idle).observe(context) == ()
    part = SkipLayers(remove=1, part="feed_forward").observe(context)
    assert [(tap.node, tap.other) for tap in part] == [
        (v.blocks[i].sublayers[1].exit.name, v.blocks[i].sublayers[1].entry.name) for i in (1, 3)
    ]
    with pytest.raises(PlanError, match="needs calibration text") as caught:
        SkipLayers(remove=1).plan(context)
    assert caught.value.code == "no_calibration"


def test_parts_of_layers() -> None:
    v = views()
    for part, index in (("attention", 0), ("feed_forward", 1)):
        plan = planned(v, layers=[0, 2], part=part)
        assert [(edit.index, edit.parts) for edit in plan.edits if isinstance(edit, Skip)] == [
            (0, (index,)),
            (2, (index,)),
        ]
        after = apply_edits(v.program, v, plan.edits)
        gone = "attention" if part == "attention" else "feed_forward"
        assert not any(name.startswith((f"layers.0.{gone}", f"layers.2.{gone}")) for name in after.weights)
        given = random_inputs(v.program, {"B": 2, "S": 5}, 0)
        emulated = emulate_edits(v.program, v, plan.edits).module(torch.float64)(**given)
        assert torch.equal(after.module(torch.float64)(**given)[0], emulated[0])
    # Every attention may go; whole layers may not all go.
    assert len(planned(v, layers="all", part="attention").edits) == 5
    assert len(planned(v, remove=5, part="attention", choose="last").edits) == 5
    error = refusal(v, layers="all")
    assert error.code == "no_layers_left"
    assert "would take out all 5 layers" in str(error)


def test_parts_that_run_side_by_side() -> None:
    v = views(3, place="parallel")
    plan = planned(v, layers=[1], part="attention")
    assert plan.edits == ()
    assert set(reasons(plan)) == {f"layers.{i}" for i in range(3)}
    assert all("side by side in one sub-layer; only part: block" in reason for reason in reasons(plan).values())
    assert SkipLayers(remove=1, part="attention").observe(Context(v, (0, 1, 2))) == ()
    assert taken(planned(v, layers=[1])) == [1]


def test_a_part_that_a_layer_has_not() -> None:
    v = Views(apply_edits(views().program, views(), planned(views(), layers=[1], part="feed_forward").edits))
    plan = planned(v, layers="all", part="feed_forward")
    assert taken(plan) == [0, 2, 3, 4]
    assert list(reasons(plan).values()) == ["it has no sub-layer of kind feed_forward (it has attention)"]
    plan = planned(v, remove=1, part="feed_forward", choose="last")
    assert reasons(plan)["layers.1"].startswith("it has no sub-layer")
    error = refusal(v, remove=5, part="feed_forward", choose="last")
    assert "cannot take 5 of 4 layers out" in str(error)
    assert error.diagnostics[0].help == ("remove at most 4",)


@pytest.mark.parametrize(
    ("where", "fields", "message", "help"),
    [
        (None, {"remove": 5, "choose": "last"}, "cannot take 5 of 5 layers out", "remove at most 4"),
        (
            None,
            {"remove": 6, "part": "attention", "choose": "last"},
            "cannot take 6 of 5 layers out",
            "remove at most 5",
        ),
        ((1, 2), {"remove": 3, "choose": "last"}, "cannot take 3 of 2 layers out", "remove at most 2"),
        (None, {"remove": 4, "choose": "evenly"}, "cannot spread 4 over 5 layers", "use choose: last"),
        ((0, 4), {"remove": 1, "choose": "evenly"}, "cannot spread 1 over 2 layers", "use choose: last"),
    ],
)
def test_more_than_there_are(where: tuple[int, ...] | None, fields: dict[str, Any], message: str, help: str) -> None:
    error = refusal(views(), where, **fields)
    assert error.code == "too_few_layers"
    assert message in str(error)
    assert error.diagnostics[0].help[0].startswith(help)


def test_as_many_as_there_are() -> None:
    assert taken(planned(views(), (1, 2), remove=2, choose="last")) == [1, 2]
    assert taken(planned(views(), remove=4, choose="last")) == [1, 2, 3, 4]


def test_where_selects_nothing() -> None:
    plan = planned(views(), (), remove=1, choose="last")
    assert plan.edits == ()
    assert set(reasons(plan).values()) == {"outside where"}
    assert len(plan.declines) == 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of layers, speedup and remove, not none of them"),
        ({"layers": [1], "remove": 2}, "not layers and remove"),
        ({"speedup": 2, "choose": "last"}, "reads choose only with remove"),
        ({"remove": 2, "spacing": "linspace"}, "reads spacing only with speedup"),
        ({"layers": [1], "choose": "last"}, "reads choose only with remove"),
        ({"speedup": 0.9}, "greater than or equal to 1"),
        ({"speedup": 1001}, "less than or equal to 1000"),
        ({"speedup": float("inf")}, "finite"),
        ({"remove": 0}, "greater than or equal to 1"),
        ({"remove": 1, "part": "norm"}, "block"),
    ],
)
def test_options_that_make_no_sense(fields: dict[str, Any], words: str) -> None:
    with pytest.raises((ValidationError, ScalarError), match=words):
        SkipLayers.model_validate(fields)


def test_options_at_their_bounds() -> None:
    assert SkipLayers(speedup=1).speedup == 1
    assert SkipLayers(speedup=1000).speedup == 1000
    assert SkipLayers(remove=1).remove == 1
    assert SkipLayers(speedup=2, spacing="upstream").to_yaml() == {"use": "skip_layers", "speedup": 2.0}
    config = SkipLayers(remove=1)
    assert (config.choose, config.spacing, config.part) == ("block_influence", "upstream", "block")
    with pytest.raises(ValidationError):
        config.remove = 2
    assert SkipLayers.effect is Effect.APPROXIMATE
    assert SkipLayers.forbids == {Fact.LOWERED, Fact.KV_CACHED}


def test_a_model_without_layers() -> None:
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    plain = capture_module(torch.nn.Linear(4, 4), (Input("input", ("B", 4), torch.float32),))
    plan = SkipLayers(remove=1, choose="last").plan(Context(Views(plain), ()))
    assert reasons(plan) == {"model": "no repeated residual structure was found, so there are no layers"}
    assert plan.edits == ()
