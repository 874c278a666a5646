"""Pruning: the surgery equals the same change done without surgery, on every layout of heads and neurons."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.frontend.export import capture_module
from graphopt.ir.program import Input, Program
from graphopt.ir.run import bind_inputs, specialised
from graphopt.observe import observe
from graphopt.passes.width.base import WidthPass
from graphopt.passes.width.prune_heads import PruneHeads
from graphopt.passes.width.prune_hidden import PruneHidden
from graphopt.passes.width.prune_neurons import PruneNeurons
from graphopt.passes.width.prune_units import PruneUnits
from graphopt.passkit import Context, Plan
from graphopt.passkit.edits import Cut, apply_edits, emulate_edits
from graphopt.select.options import Activation, Amount, Fluctuation, Global, Magnitude, TaylorScore
from graphopt.spec import Percent
from graphopt.views import Views
from tests.tiny import program, tokens
from tests.views import structures

HALF = Amount.parse("50%")
SHAPES = ((1, 1), (2, 7), (3, 33))
# Doubles add up in another order, over at most 128 terms in three layers.
TOLERANCE = 1e-12


@cache
def views(name: str) -> Views:
    return Views(program(name))


def planned(config: WidthPass, name: str, layers: tuple[int, ...] | None = None) -> tuple[Context, Plan]:
    v = views(name)
    context = Context(v, layers if layers is not None else tuple(range(len(v.blocks))))
    watched = config.observe(context)
    if watched:
        text = [{"input_ids": part} for part in tokens(8, 16).split(4)]
        statistics = observe(v.program, watched, text, dtype=torch.float64, views=v)
        context = Context(v, context.layers, statistics)
    return context, config.plan(context)


def inputs(program: Program, batch: int, seq: int) -> dict[str, torch.Tensor]:
    given = {"input_ids": tokens(batch, seq, seed=seq)}
    if batch > 1 and any(spec.role == "padding" for spec in program.entry.inputs):
        mask = torch.ones(batch, seq, dtype=torch.long)
        mask[-1, seq // 2 :] = 0
        given["attention_mask"] = mask
    return given


def check(context: Context, plan: Plan) -> Program:
    cut = apply_edits(context.program, context.views, plan.edits)
    masked = emulate_edits(context.program, context.views, plan.edits)
    ours, theirs = cut.module(torch.float64), masked.module(torch.float64)
    whole = context.program.module(torch.float64)
    for batch, seq in SHAPES:
        given = inputs(context.program, batch, seq)
        got, want = ours(**given)[0], theirs(**given)[0]
        assert float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())
        assert float((want - whole(**given)[0]).abs().max()) > 1e-3 * float(want.abs().max())
    assert cut.weights.parameters < context.program.weights.parameters
    return cut


LAYOUTS = ["llama", "llama_mha", "llama_mqa", "gpt2", "neox", "phi3", "gemma2", "llama_bias"]
PAIRS: dict[str, tuple[WidthPass, WidthPass]] = {
    "query-compensated": (
        PruneHeads(keep=HALF, score=Fluctuation(), compensate="mean_bias"),
        PruneNeurons(keep=HALF, score=Fluctuation(metric="wifn"), compensate="mean_bias"),
    ),
    "kv_group": (
        PruneHeads(unit="kv_group", keep=HALF, score=Activation()),
        PruneNeurons(keep=HALF, score=TaylorScore(), allocate=Global()),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_cut_equals_mask(name: str, pair: str) -> None:
    (context, heads), (_, neurons) = (planned(config, name) for config in PAIRS[pair])
    assert neurons.edits
    if name == "llama_mqa" and pair == "kv_group":
        assert {decline.reason for decline in heads.declines} == {"it has a single KV head"}
    else:
        assert len(heads.edits) == 3
    check(context, Plan(heads.edits + neurons.edits))


@pytest.mark.parametrize(
    ("name", "score"),
    [("llama", Activation()), ("llama_mha", Fluctuation()), ("phi3", TaylorScore()), ("gemma2", Magnitude())],
)
def test_a_narrower_stream_equals_zeroed_writes(name: str, score: Any) -> None:
    context, plan = planned(PruneHidden(keep=Amount.parse("75%"), score=score), name)
    cut = check(context, plan)
    assert {block.exit.meta["val"].shape[-1] for block in Views(cut).blocks} == {24}


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_layer_norm_streams_are_declined(name: str) -> None:
    _, plan = planned(PruneHidden(keep=HALF), name)
    assert not plan.edits
    assert [decline.candidate for decline in plan.declines] == ["residual:hidden"]
    assert "averages over the axis to cut, and has no exact fold" in plan.declines[0].reason


@pytest.mark.parametrize("units", [("query", "neuron"), ("kv_group", "neuron")])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pool_of_heads_and_neurons(name: str, units: Any) -> None:
    config = PruneUnits(units=units, keep=HALF, allocate=Global(tolerance=Percent.parse("3%")), compensate="mean_bias")
    context, plan = planned(config, name)
    cut = check(context, plan)
    budget = plan.notes["budget"]
    assert abs(budget["kept"] - budget["target"]) <= 0.03 * budget["total"]
    biases = sum(edit.means != {} for edit in plan.edits if isinstance(edit, Cut))
    lost = context.program.weights.parameters - cut.weights.parameters
    spent = budget["total"] - budget["kept"]
    # Compensation adds a bias of the stream's width where there was none.
    assert lost == spent - (biases * 32 if name == "llama" else 0)


def test_norms_over_all_heads_forbid_cutting_heads() -> None:
    _, plan = planned(PruneHeads(keep=HALF), "olmo2")
    assert not plan.edits
    assert all("q_norm averages over it" in decline.reason for decline in plan.declines)


def test_grouped_query_heads_stay_equally_many() -> None:
    context, plan = planned(PruneHeads(keep=HALF, score=Fluctuation()), "llama")
    for edit in plan.edits:
        assert isinstance(edit, Cut)
        assert [len(row) for row in edit.keep] == [1, 1]  # type: ignore[arg-type]
    cut = Views(apply_edits(context.program, context.views, plan.edits))
    assert [(a.heads, a.kv_heads, a.head_dim) for a in cut.attentions] == [(2, 2, 8)] * 3


def test_a_kv_group_takes_its_queries_along() -> None:
    context, plan = planned(PruneHeads(unit="kv_group", keep=HALF), "llama")
    cut = Views(apply_edits(context.program, context.views, plan.edits))
    assert [(a.heads, a.kv_heads, a.head_dim) for a in cut.attentions] == [(2, 1, 8)] * 3


def products(program: Program, given: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    """Values of some nodes in float64."""
    found = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value
            return value

    graph = specialised(program, torch.float64, "cpu")
    weights = [
        program.weights.evaluate(node.meta["weight"], torch.float64)
        for node in program.graph.graph.nodes
        if "weight" in node.meta
    ]
    Watch(graph).run(*weights, *bind_inputs(program, given, "cpu"))
    return found


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_mean_is_never_worse_on_the_calibration_text(name: str, kind: str) -> None:
    """On what the product after the cut gives: its input is the same in both, and the mean is the best constant."""
    v = views(name)
    product = v.blocks[1].attentions[0].o if kind == "heads" else v.blocks[1].feed_forwards[0].down
    assert product is not None
    text = tokens(8, 16)
    errors = {}
    node = product.node.name
    for compensate in ("none", "mean_bias"):
        make: Any = PruneHeads if kind == "heads" else PruneNeurons
        _, plan = planned(make(keep=HALF, score=Fluctuation(), compensate=compensate), name, layers=(1,))
        cut = emulate_edits(v.program, v, plan.edits)
        want = products(v.program, {"input_ids": text}, {node})[node]
        got = products(cut, {"input_ids": text}, {node})[node]
        errors[compensate] = (got - want).reshape(-1, want.shape[-1])
    plain, better = errors["none"].square().sum(), errors["mean_bias"].square().sum()
    assert better < plain
    # What is left has mean zero: no constant does better.
    torch.testing.assert_close(errors["mean_bias"].mean(0), torch.zeros(32, dtype=torch.float64), rtol=0, atol=1e-12)


def test_plans_are_the_same_each_time() -> None:
    config = PruneUnits(keep=HALF, allocate=Global(tolerance=Percent.parse("3%")))
    one, other = (planned(config, "llama")[1] for _ in range(2))
    assert [edit.to_json() for edit in one.edits] == [edit.to_json() for edit in other.edits]
    assert one.notes == other.notes


def test_sizes_that_count_batch_and_heads_together_are_refused_until_they_are_cleaned() -> None:
    class Merged(structures.Attend):
        def turn(self, x: torch.Tensor) -> torch.Tensor:
            b, h, s, d = x.shape
            return torch.tanh(x.reshape(b * h, s, d)).reshape(b, h, s, d)

    module = structures.Model(*(structures.Layer(Merged(), structures.Feed()) for _ in range(2)))
    before = capture_module(module, (Input("ids", ("B", "S"), torch.int64, "tokens"),))
    config = PruneHeads.model_validate_json('{"keep": "75%"}')
    views = Views(before)
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    with pytest.raises(PlanError, match="symbolic one together") as caught:
        apply_edits(before, views, plan.edits)
    assert "use: cleanup" in str(caught.value)
