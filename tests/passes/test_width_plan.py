"""What the width passes decide, on models of our own that capture in a moment: every view answered, each reason, costs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graphopt.compiler.verify import random_inputs
from graphopt.diagnostics import BudgetError, PlanError
from graphopt.observe import observe
from graphopt.passes.width.base import WidthPass
from graphopt.passes.width.plan import cost, sizes
from graphopt.passes.width.prune_heads import PruneHeads
from graphopt.passes.width.prune_hidden import PruneHidden
from graphopt.passes.width.prune_neurons import PruneNeurons
from graphopt.passes.width.prune_units import PruneUnits
from graphopt.passkit import Context, Cut, Plan
from graphopt.passkit.edits import apply_edits
from graphopt.select.options import Fluctuation, Magnitude, Uniform
from graphopt.spec import ScalarError
from graphopt.testing.models import Shape, build
from graphopt.views import Views, unit_groups

GROUPED: dict[str, Any] = {
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "hidden": 8,
    "neurons": 6,
    "gated": True,
}
EQUAL: dict[str, Any] = {**GROUPED, "kv_heads": 4}
HALF: dict[str, Any] = {"keep": "50%"}


@cache
def _views(values: tuple[tuple[str, Any], ...]) -> Views:
    return Views(build(Shape(**dict(values))))


def views(**values: Any) -> Views:
    return _views(tuple(sorted(values.items())))


def planned(
    kind: type[WidthPass], v: Views, layers: tuple[int, ...] = (0, 1, 2), paths: tuple[str, ...] = (), **options: Any
) -> Plan:
    config = kind.model_validate(options)
    context = Context(v, layers, paths=paths)
    taps = config.observe(context)
    if taps:
        batches = [random_inputs(v.program, {"B": 2, "S": 9}, 0)]
        context = Context(v, layers, observe(v.program, taps, batches, dtype=torch.float64), paths=paths)
    return config.plan(context)


def counts(plan: Plan) -> dict[str, tuple[int, int]]:
    return {edit.candidate: edit.count() for edit in plan.edits if isinstance(edit, Cut)}


def reasons(plan: Plan) -> dict[str, str]:
    return {decline.candidate: decline.reason for decline in plan.declines}


# --- every view is answered ----------------------------------------------------------------------------------------


def test_one_cut_a_view() -> None:
    v = views(**GROUPED)
    plan = planned(PruneNeurons, v, **HALF)
    assert counts(plan) == {f"layers.{i}.feed_forward:neuron": (6, 3) for i in range(3)}
    assert reasons(plan) == {}
    cut = plan.edits[0]
    assert isinstance(cut, Cut)
    assert (cut.view, cut.unit, cut.at, cut.by, cut.score, cut.size) == (
        "layers.0.feed_forward", "neuron", "consumers", None, "magnitude", 6
    )  # fmt: skip
    assert plan.notes["score"] == {"kind": "magnitude"}
    assert plan.notes["budget"] == {"of": "units", "target": 9.0, "kept": 9, "total": 18}


def test_query_heads_are_cut_in_rows() -> None:
    plan = planned(PruneHeads, views(**GROUPED), **HALF)
    assert counts(plan) == {f"layers.{i}.attention:query": (4, 2) for i in range(3)}
    cut = plan.edits[0]
    assert isinstance(cut, Cut)
    assert cut.by is not None
    assert [len(row) for row in cut.keep] == [1, 1]  # type: ignore[arg-type]
    assert cut.size == 2
    groups = planned(PruneHeads, views(**GROUPED), unit="kv_group", **HALF)
    assert counts(groups) == {f"layers.{i}.attention:kv_group": (2, 1) for i in range(3)}


def test_what_where_leaves_out_is_declined() -> None:
    plan = planned(PruneNeurons, views(**GROUPED), layers=(1,), **HALF)
    assert list(counts(plan)) == ["layers.1.feed_forward:neuron"]
    assert reasons(plan) == {f"layers.{i}.feed_forward:neuron": "outside `where`" for i in (0, 2)}
    for path in ("layers.2", "layers.2.feed_forward"):
        assert list(counts(planned(PruneNeurons, views(**GROUPED), paths=(path,), **HALF))) == [
            "layers.2.feed_forward:neuron"
        ]


def test_views_that_keep_everything_or_are_not_listed() -> None:
    plan = planned(PruneNeurons, views(**GROUPED), keep="100%")
    assert plan.edits == ()
    assert set(reasons(plan).values()) == {"keeps all 6"}
    listed = {"kind": "explicit", "keep": {1: (5, 0), 2: (0, 1, 2, 3, 4, 5)}}
    plan = planned(PruneNeurons, views(**GROUPED), allocate=listed)
    assert counts(plan) == {"layers.1.feed_forward:neuron": (6, 2)}
    assert reasons(plan) == {
        "layers.0.feed_forward:neuron": "not listed",
        "layers.2.feed_forward:neuron": "keeps all 6",
    }
    assert plan.edits[0].keep == (0, 5)  # type: ignore[attr-defined]
    assert plan.notes["budget"] == {"of": "units", "target": 14.0, "kept": 14, "total": 18}
    gone = planned(PruneNeurons, views(**GROUPED), allocate={"kind": "explicit", "remove": {1: (1, 2, 3, 4)}})
    assert gone.edits[0].to_json() == plan.edits[0].to_json()


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        ({"kind": "explicit", "keep": {3: (0,)}}, "allocate lists layer 3, which this step cannot cut"),
        ({"kind": "explicit", "remove": {0: (6,)}}, "has no unit 6"),
        ({"kind": "explicit", "remove": {0: (0, 0)}}, "listed twice"),
        ({"kind": "explicit", "remove": {0: (0, 1, 2, 3, 4, 5)}}, "would keep no unit"),
        ({"kind": "per_layer", "keep": ("50%", "50%")}, "allocate lists 2 layers, but the step is about 3"),
    ],
)
def test_lists_that_do_not_fit_the_model(allocate: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        planned(PruneNeurons, views(**GROUPED), allocate=allocate)
    if "layer 3" in words:
        assert caught.value.notes == ("it can cut layers [0, 1, 2]",)


def test_one_amount_for_each_selected_layer() -> None:
    plan = planned(
        PruneNeurons, views(**GROUPED), layers=(0, 2), allocate={"kind": "per_layer", "keep": ("2", "neurons - 1")}
    )
    assert counts(plan) == {"layers.0.feed_forward:neuron": (6, 2), "layers.2.feed_forward:neuron": (6, 5)}


def test_single_units_and_missing_views() -> None:
    lone = views(layers=2, heads=2, kv_heads=1, neurons=4, head_dim=2)
    plan = planned(PruneHeads, lone, layers=(0, 1), unit="kv_group", **HALF)
    assert plan.edits == ()
    assert set(reasons(plan).values()) == {"it has a single KV head"}
    assert sorted(reasons(plan)) == ["layers.0.attention:kv_group", "layers.1.attention:kv_group"]
    one = planned(PruneHeads, views(layers=1), layers=(0,), keep="100%")
    assert list(reasons(one)) == ["layers.0.attention:query"]
    assert one.edits == ()


def test_a_model_without_such_views() -> None:
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    plain = Views(capture_module(torch.nn.Linear(4, 4), (Input("input", ("B", 4), torch.float32),)))
    assert reasons(planned(PruneHeads, plain, layers=(), **HALF)) == {"model:query": "no attention was found"}
    assert reasons(planned(PruneHeads, plain, layers=(), unit="kv_group", **HALF)) == {
        "model:kv_group": "no attention was found"
    }
    found = reasons(planned(PruneNeurons, plain, layers=(), **HALF))
    assert found == {"model:neuron": "no feed-forward of more than one neuron was found"}
    hidden = planned(PruneHidden, plain, layers=(), **HALF)
    assert reasons(hidden) == {"residual:hidden": "no residual stream was found"}
    assert "budget" not in hidden.notes


class Joint(torch.nn.Module):
    """A layer whose query norm runs over all heads at once, as OLMo 2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The stream `[B, S, 8]` after the layer."""
        x = self.embed(ids)
        q, k, v = self.norm(self.q(x)), self.k(x), self.v(x)
        q, k, v = (y.view(*ids.shape, 2, 4).transpose(1, 2) for y in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_norms_that_average_over_the_units_decline_them() -> None:
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    v = Views(capture_module(Joint(), (Input("ids", ("B", "S"), torch.int64, "tokens"),)))
    (attention,) = v.attentions
    plan = planned(PruneHeads, v, layers=(0,), **HALF)
    assert reasons(plan) == {
        f"{attention.path}:query": "the norm at norm averages over it, so that a cut changes what stays"
    }
    assert plan.edits == ()


class Numbered(torch.nn.Module):
    """A layer whose queries are in another order and values summed over the heads, so that no head stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The stream `[B, S, 8]` after the layer."""
        x = self.embed(ids)
        q, k, v = (f(x).view(*ids.shape, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, v = torch.flip(q, [1]), torch.cumsum(v, 1)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def _one(module: torch.nn.Module) -> Views:
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    return Views(capture_module(module, (Input("ids", ("B", "S"), torch.int64, "tokens"),)))


def test_the_first_of_several_reasons_is_given() -> None:
    v = _one(Numbered())
    (group,) = unit_groups(v, "query")
    assert set(group.locked) == {"op flip at %flip is not understood", "cumsum at %cumsum runs over it"}
    assert set(reasons(planned(PruneHeads, v, layers=(0,), **HALF)).values()) == {group.locked[0]}


# --- the stream ----------------------------------------------------------------------------------------------------


def test_the_stream_is_cut_at_its_producers() -> None:
    v = views(**GROUPED)
    plan = planned(PruneHidden, v, **HALF)
    assert counts(plan) == {"residual:hidden": (8, 4)}
    cut = plan.edits[0]
    assert isinstance(cut, Cut)
    assert cut.at == "producers"
    narrow = apply_edits(v.program, v, plan.edits)
    assert narrow.weights["embedding.weight"].expr.shape == (5, 4)
    assert counts(planned(PruneHidden, v, keep="hidden - layers")) == {"residual:hidden": (8, 5)}
    for wrong in ({"layers": (0, 1)}, {"paths": ("layers.0",)}):
        with pytest.raises(PlanError, match="cannot differ between them") as caught:
            planned(PruneHidden, v, **wrong, **HALF)  # type: ignore[arg-type]
        assert caught.value.code == "where_hidden"


def test_a_stream_that_cannot_be_cut_is_declined() -> None:
    plan = planned(PruneHidden, views(**GROUPED, norm="layer"), **HALF)
    assert plan.edits == ()
    assert list(reasons(plan)) == ["residual:hidden"]
    assert len(reasons(plan)["residual:hidden"]) > 20


# --- amounts, costs, budgets ---------------------------------------------------------------------------------------


def test_dimensions_of_expressions() -> None:
    v = views(**GROUPED)
    (query, *_), (group, *_), (neuron, *_), (hidden,) = (
        unit_groups(v, f) for f in ("query", "kv_group", "neuron", "hidden")
    )
    assert sizes(v, query) == sizes(v, group) == {"layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 4}
    assert sizes(v, neuron) == {"layers": 3, "neurons": 6, "hidden": 8}
    assert sizes(v, hidden) == {"layers": 3, "hidden": 8}
    assert set(counts(planned(PruneNeurons, v, keep="neurons - layers + hidden / 8")).values()) == {(6, 4)}
    assert set(counts(planned(PruneHeads, v, keep="heads / kv_heads")).values()) == {(4, 2)}


def test_what_a_unit_costs() -> None:
    v = views(**GROUPED, biases=True)
    query, group, neuron = (unit_groups(v, f)[0] for f in ("query", "kv_group", "neuron"))
    assert [cost("units", g, v) for g in (query, group, neuron)] == [1, 1, 1]
    # A query head: 4 rows of q with their biases, 4 columns of o. A KV group: two of these, and rows of k and v.
    assert cost("parameters", query, v) == 4 * 8 + 4 + 8 * 4
    assert cost("parameters", group, v) == 2 * (4 * 8 + 4 + 8 * 4) + 2 * (4 * 8 + 4)
    assert cost("parameters", neuron, v) == 2 * (8 + 1) + 8
    # Two FLOPs a weight and token; biases are no products.
    assert cost("flops", query, v) == 2 * (4 * 8 + 8 * 4)
    assert cost("flops", group, v) == 2 * (2 * (4 * 8 + 8 * 4) + 2 * (4 * 8))
    assert cost("flops", neuron, v) == 2 * (3 * 8)
    assert [cost("kv_bytes", g, v) for g in (query, group, neuron)] == [0, (4 + 4) * 4, 0]
    half = views(**GROUPED, dtype="bfloat16")
    assert cost("kv_bytes", unit_groups(half, "kv_group")[0], half) == (4 + 4) * 2


@pytest.mark.parametrize(
    ("of", "each"), [("units", 1), ("parameters", 4 * 4 * 8), ("flops", 2 * 4 * 4 * 8), ("kv_bytes", 32)]
)
def test_a_global_budget_is_in_its_own_unit(of: str, each: int) -> None:
    v = views(**EQUAL)
    plan = planned(PruneHeads, v, unit="kv_group", of=of, allocate={"kind": "global"}, **HALF)
    assert plan.notes["budget"] == {"of": of, "target": 6.0 * each, "kept": 6 * each, "total": 12 * each}
    assert sum(kept for _, kept in counts(plan).values()) + 4 * len(plan.declines) == 6
    removed = v.program.weights.parameters - apply_edits(v.program, v, plan.edits).weights.parameters
    assert removed == 6 * 4 * 4 * 8


def test_units_that_hold_nothing_of_the_budget() -> None:
    with pytest.raises(PlanError, match="these units hold no kv_bytes") as caught:
        planned(PruneHeads, views(**GROUPED), of="kv_bytes", allocate={"kind": "global"}, **HALF)
    assert caught.value.code == "costless"
    assert "KV bytes go with unit: kv_group" in caught.value.diagnostics[0].help


def test_a_pool_of_both_kinds_of_units() -> None:
    v = views(**EQUAL)
    options = {"score": {"kind": "magnitude"}, "allocate": {"kind": "global", "tolerance": "10%", "minimum": 2}}
    plan = planned(PruneUnits, v, keep="60%", **options)
    budget = plan.notes["budget"]
    assert budget["of"] == "parameters"
    assert abs(budget["kept"] - 0.6 * budget["total"]) <= 0.1 * budget["total"]
    removed = v.program.weights.parameters - apply_edits(v.program, v, plan.edits).weights.parameters
    assert removed == budget["total"] - budget["kept"]
    answered = {*counts(plan), *reasons(plan)}
    assert answered == {
        f"layers.{i}.{part}" for i in range(3) for part in ("attention:kv_group", "feed_forward:neuron")
    }
    assert min(kept for _, kept in counts(plan).values()) >= 2


def test_a_pool_compares_scores_as_it_was_told() -> None:
    """With raw magnitudes the layer of small weights loses everything it may; standardised, layers are alike."""
    from graphopt.ir.rewriter import Rewriter
    from graphopt.ir.weights import Affine

    rewriter = Rewriter(build(Shape(**GROUPED)))
    for name in ("up", "gate", "down"):
        rewriter.set_weight(f"layers.1.feed_forward.{name}.weight", lambda expr: Affine(expr, 1e-3))
    v = Views(rewriter.finish())
    raw = planned(PruneNeurons, v, keep="72%", allocate={"kind": "global", "normalise": "none", "tolerance": "3%"})
    assert counts(raw) == {"layers.1.feed_forward:neuron": (6, 1)}
    fair = planned(PruneNeurons, v, keep="72%", allocate={"kind": "global", "tolerance": "3%"})
    assert len(counts(fair)) > 1
    # Outside a pool scores are compared within a view alone.
    assert set(counts(planned(PruneNeurons, v, keep="50%")).values()) == {(6, 3)}


def test_budgets_that_miss_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"layers\.0\.feed_forward:neuron: 1\.5 of 6 units"):
        planned(PruneNeurons, views(**GROUPED), keep="25%")
    wide = planned(PruneNeurons, views(**GROUPED), keep="25%", allocate={"kind": "uniform", "tolerance": "10%"})
    assert set(counts(wide).values()) == {(6, 2)}
    assert set(counts(planned(PruneNeurons, views(**GROUPED), keep="4", round=4)).values()) == {(6, 4)}
    with pytest.raises(BudgetError, match="no number of units up to 6 can be divided by 7"):
        planned(PruneNeurons, views(**GROUPED), keep="50%", round=7)


# --- scores and compensation ---------------------------------------------------------------------------------------


def test_the_smallest_units_go() -> None:
    v = views(**EQUAL)
    plan = planned(PruneNeurons, v, **HALF)
    for i, edit in enumerate(plan.edits):
        assert isinstance(edit, Cut)
        rows = [v.program.weights.evaluate(f"layers.{i}.feed_forward.{name}.weight") for name in ("up", "gate", "down")]
        norms = rows[0].pow(2).sum(1) + rows[1].pow(2).sum(1) + rows[2].pow(2).sum(0)
        assert edit.keep == tuple(sorted(norms.topk(3).indices.tolist()))


def test_what_is_observed() -> None:
    v = views(**GROUPED)
    context = Context(v, (0, 2))
    assert PruneNeurons.model_validate(HALF).observe(context) == ()
    kinds = {"score": {"kind": "fluctuation"}, "compensate": "mean_bias", **HALF}
    taps = PruneNeurons.model_validate(kinds).observe(context)
    inputs = [v.blocks[i].feed_forwards[0].down.x.name for i in (0, 2)]
    assert sorted({tap.node for tap in taps}) == sorted(inputs)
    assert len(set(taps)) == len(taps)
    assert {
        tap.node for tap in PruneNeurons.model_validate({"compensate": "mean_bias", **HALF}).observe(context)
    } == set(inputs)


def test_compensation_holds_the_mean_of_what_goes() -> None:
    v = views(**GROUPED)
    plain = planned(PruneNeurons, v, **HALF)
    assert plain.edits[0].means == {}  # type: ignore[attr-defined]
    plan = planned(PruneNeurons, v, compensate="mean_bias", **HALF)
    for i, edit in enumerate(plan.edits):
        assert isinstance(edit, Cut)
        down = v.blocks[i].feed_forwards[0].down.node
        assert list(edit.means) == [down.name]
        assert edit.means[down.name].shape == (6,)
        assert edit.means[down.name].dtype == torch.float64
    with pytest.raises(PlanError, match="mean_bias needs calibration text") as caught:
        PruneNeurons.model_validate({"compensate": "mean_bias", **HALF}).plan(Context(v, (0, 1, 2)))
    assert caught.value.code == "no_calibration"


# --- options -------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    heads = PruneHeads.model_validate(HALF)
    assert (heads.unit, heads.of, heads.compensate, heads.round) == ("query", "units", "none", 1)
    assert heads.allocation == Uniform()
    assert heads.score == Magnitude()
    assert heads.families == ("query",)
    assert PruneHeads.model_validate({"unit": "kv_group", **HALF}).families == ("kv_group",)
    assert PruneNeurons.model_validate(HALF).families == ("neuron",)
    hidden = PruneHidden.model_validate(HALF)
    assert (hidden.families, hidden.account, hidden.compensation) == (("hidden",), "units", "none")
    units = PruneUnits.model_validate(HALF)
    assert (units.families, units.account, units.score) == (("kv_group", "neuron"), "parameters", Fluctuation())


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (PruneNeurons, {}, "keep is missing"),
        (PruneNeurons, {"keep": "50%", "round": 0}, "greater than or equal to 1"),
        (PruneNeurons, {"keep": "50%", "round": (1 << 20) + 1}, "less than or equal to 1048576"),
        (PruneNeurons, {"allocate": {"kind": "explicit", "keep": {0: (1,)}}, "round": 2}, "round says nothing"),
        (PruneNeurons, {"keep": "50%", "allocate": {"kind": "explicit", "keep": {0: (1,)}}}, "both say what stays"),
        (PruneUnits, {"keep": "50%", "units": ("query", "kv_group")}, "overlap"),
        (PruneUnits, {"keep": "50%", "units": ("kv_group", "query", "neuron")}, "overlap"),
        (PruneUnits, {"keep": "50%", "units": ("neuron", "neuron")}, "overlap"),
        (PruneUnits, {"keep": "50%", "units": ()}, "at least 1"),
        (PruneUnits, {"keep": "3"}, "no percentage of the pool"),
        (PruneHeads, {"keep": "neurons"}, "neurons"),
        (PruneHidden, {"keep": "50%", "compensate": "mean_bias"}, "[Ee]xtra"),
    ],
)
def test_options_that_make_no_sense(kind: type[WidthPass], options: dict[str, Any], words: str) -> None:
    with pytest.raises((ValidationError, ScalarError), match=words):
        kind.model_validate(options)


def test_options_at_their_bounds() -> None:
    assert PruneNeurons.model_validate({"keep": "50%", "round": 1 << 20}).round == 1 << 20
    listed = {"allocate": {"kind": "explicit", "keep": {0: (1,)}}, "round": 1}
    assert PruneNeurons.model_validate(listed).round == 1
    for units in (("query",), ("query", "neuron"), ("neuron",)):
        assert PruneUnits.model_validate({"keep": "50%", "units": units}).families == units
    with pytest.raises(NotImplementedError):
        WidthPass.model_validate(HALF).families  # noqa: B018
