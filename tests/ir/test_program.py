"""Programs run, are changed and stay consistent: binding, precision, purity, the Rewriter, shapes."""

from __future__ import annotations

import math
import operator
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Dim, Entry, Input, Origin, Program, specialise
from graphopt.ir.purity import eliminate_dead_code, is_pure
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.run import Runner, bind_inputs, specialised
from graphopt.ir.shapes import propagate
from graphopt.ir.text import print_program
from graphopt.ir.weights import Affine, Const, Take
from tests.ir.conftest import EMBED, GAIN, TABLE, make

aten = torch.ops.aten
f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
IDS = torch.tensor([[1, 2, 6], [3, 0, 5]])


def expected(
    ids: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """What the program by hand means, in plain torch; float64 rounds nowhere."""
    wide = torch.promote_types(dtype, f32)
    x = (EMBED.to(dtype)[ids].to(wide) + TABLE.to(wide)[places]).to(dtype)
    up = x.to(wide)
    normed = (up * torch.rsqrt(up.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype) * GAIN.to(dtype)
    return torch.nn.functional.linear(normed, EMBED.to(dtype)) * mask[..., None], normed


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, f32, f64])
def test_a_run_in_each_precision(by_hand: Program, dtype: torch.dtype | None) -> None:
    places, mask = torch.tensor([[0, 1, 2], [5, 9, 63]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    got = by_hand.module(dtype)(ids=IDS, mask=mask, places=places)
    assert isinstance(got, tuple)
    for mine, theirs in zip(got, expected(IDS, places, mask, dtype or bf16), strict=True):
        assert mine.dtype == (dtype or bf16)
        assert torch.allclose(mine, theirs, rtol=1e-12 if dtype == f64 else 0, atol=0)
    assert by_hand.module()(ids=IDS)[0].dtype == f32


def test_padding_and_positions_are_filled_in(by_hand: Program) -> None:
    ids, mask, places = bind_inputs(by_hand, {"ids": IDS}, "cpu")
    assert ids is IDS
    assert torch.equal(mask, torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(places, torch.tensor([[0, 1, 2], [0, 1, 2]]))
    given = torch.tensor([[4, 4, 4], [1, 1, 1]])
    assert bind_inputs(by_hand, {"ids": IDS, "places": given}, "cpu")[2] is given
    assert [tuple(t.shape) for t in bind_inputs(by_hand, {"ids": IDS[:1, :1]}, "cpu")] == [(1, 1)] * 3
    assert bind_inputs(by_hand, {"ids": IDS}, "meta")[2].device.type == "meta"


def test_missing_and_unknown_inputs_are_named(by_hand: Program) -> None:
    with pytest.raises(
        TypeError, match=r"unknown inputs \['idz', 'x'\]; this program takes \['ids', 'mask', 'places'\]"
    ):
        bind_inputs(by_hand, {"x": IDS, "idz": IDS}, "cpu")
    with pytest.raises(TypeError, match=r"input 'ids' \['B', 'S'\] is missing"):
        bind_inputs(by_hand, {"mask": IDS}, "cpu")
    other = replace(by_hand.entry.inputs[1], role="values")
    program = replace(by_hand, entry=replace(by_hand.entry, inputs=(by_hand.entry.inputs[0], other)))
    with pytest.raises(TypeError, match="input 'mask'"):
        bind_inputs(program, {"ids": IDS}, "cpu")
    assert bind_inputs(program, {"ids": IDS, "mask": IDS}, "cpu")[1] is IDS


def test_constants_of_dtype_and_device_follow_the_run() -> None:
    def at(value: object, target: torch.dtype) -> object:
        return specialise(value, model=bf16, target=target, device="cpu")

    assert at(bf16, f32) is f32
    assert at(bf16, f64) is f64
    # Statistics stay in float32, unless everything is wider.
    assert at(f32, torch.float16) is f32
    assert at(f32, bf16) is f32
    assert at(f32, f64) is f64
    assert at(torch.float16, f64) is f64
    assert at(torch.int64, f64) is torch.int64
    assert at(torch.bool, f32) is torch.bool
    assert specialise(torch.device("cpu"), model=bf16, target=f32, device="cuda") == torch.device("cuda")
    assert at(1.5, f64) == 1.5
    assert at("tanh", f64) == "tanh"


def test_a_specialised_copy_leaves_the_program_alone(by_hand: Program) -> None:
    before = print_program(by_hand)
    module = specialised(by_hand, f64, "cpu")
    casts = [node.args[1] for node in module.graph.nodes if node.target is aten.to.dtype]
    assert casts == [f64, f64]
    assert [node.args[1] for node in by_hand.graph.graph.nodes if node.target is aten.to.dtype] == [f32, bf16]
    assert print_program(by_hand) == before
    text = "%full = aten.ones.default([2], dtype=bf16, device=device)\nreturn logits = %full,"
    factory = make(print_program(by_hand).replace("return logits = %shown,", text))
    made = next(n for n in specialised(factory, f32, "meta").graph.nodes if n.target is aten.ones.default)
    assert made.kwargs == {"dtype": f32, "device": torch.device("meta")}


def test_a_runner_evaluates_weights_once(by_hand: Program) -> None:
    runner = Runner(by_hand, f32, "cpu")
    assert [tuple(value.shape) for value in runner.values] == [(7, 4), (4,), (64, 4)]
    assert [value.dtype for value in runner.values] == [f32] * 3
    assert [value.dtype for value in Runner(by_hand, None, "cpu").values] == [bf16, bf16, f32]
    assert torch.equal(runner(ids=IDS)[0], runner(ids=IDS)[0])


# --- programs as values --------------------------------------------------------------------------------------------


def test_names_of_nodes_weights_and_results(by_hand: Program) -> None:
    assert [node.name for node in by_hand.output_nodes] == ["shown", "norm"]
    assert list(by_hand.weight_nodes) == ["embed.weight", "norm.weight", "table"]
    assert by_hand.weight_nodes["embed.weight"].users.keys() == {by_hand.nodes["embed"], by_hand.nodes["logits"]}
    assert by_hand.nodes["joined"].target is aten.add.Tensor


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (Dim("B", 1, 8, 2), "low"),
        (Input("x", ("B",), f32), "role"),
        (Entry((), ("y",)), "outputs"),
        (Origin(), "path"),
    ],
)
def test_descriptions_are_values(made: object, name: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(made, name, None)
    assert replace(made) == made  # type: ignore[type-var]
    assert hash(replace(made)) == hash(made)  # type: ignore[type-var]


def test_defaults_of_descriptions(by_hand: Program) -> None:
    assert Input("x", (1,), f32).role == "values"
    assert Origin() == by_hand.origin == Origin("model", None, None, None)
    assert by_hand.trail == ()
    with pytest.raises(FrozenInstanceError):
        by_hand.dtype = f32  # type: ignore[misc]


# --- purity --------------------------------------------------------------------------------------------------------


def calls(*targets: object) -> list[fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    return [graph.call_function(target, (x,)) for target in targets]  # type: ignore[arg-type]


def test_which_nodes_may_go() -> None:
    pure = calls(
        aten.add.Tensor, aten.scaled_dot_product_attention.default, operator.mul, operator.getitem, math.ceil,
        torch.sym_max, torch.ops.graphopt.attention.default,
    )  # fmt: skip
    assert [is_pure(node) for node in pure] == [True] * len(pure)
    impure = calls(aten.add_.Tensor, aten.copy_.default, aten.add.out, aten._assert_async.default, print)
    assert [is_pure(node) for node in impure] == [False] * len(impure)
    graph = impure[0].graph
    assert not is_pure(next(iter(graph.nodes)))
    assert not is_pure(graph.output(()))


def test_symbolic_helpers_are_known_by_name() -> None:
    def sym_of_ours() -> None: ...

    def other() -> None: ...

    sym_of_ours.__name__ = "sym_of_ours"
    sym_of_ours.__module__ = other.__module__ = "elsewhere"
    assert [is_pure(node) for node in calls(sym_of_ours, other)] == [True, False]
    sym_of_ours.__module__ = other.__module__ = ""
    assert [is_pure(node) for node in calls(sym_of_ours, other)] == [True, False]


def test_dead_code_goes_and_inputs_stay() -> None:
    graph = fx.Graph()
    x, w, dead = graph.placeholder("x"), graph.placeholder("w"), graph.placeholder("dead")
    x.meta["input"], w.meta["weight"], dead.meta["weight"] = "x", "w", "dead"
    one = graph.call_function(aten.relu.default, (dead,))
    graph.call_function(aten.neg.default, (one,))
    check = graph.call_function(aten._assert_async.default, (x,))
    kept = graph.call_function(aten.mul.Tensor, (w, w))
    unread = graph.placeholder("unread")
    unread.meta["input"] = "unread"
    graph.output((kept,))
    assert eliminate_dead_code(graph) == 3
    assert [node.name for node in graph.nodes] == ["x", "w", check.name, kept.name, "unread", "output"]
    assert eliminate_dead_code(graph) == 0


# --- the Rewriter --------------------------------------------------------------------------------------------------


def test_an_unchanged_rewrite_is_the_same_program(by_hand: Program) -> None:
    again = Rewriter(by_hand).finish()
    assert print_program(again) == print_program(by_hand)
    assert again.graph is not by_hand.graph
    assert again.weights.source is by_hand.weights.source
    assert all("val" in node.meta for node in again.graph.graph.nodes if node.op != "output")


def test_nodes_are_found_by_node_and_by_name(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    old = by_hand.nodes["joined"]
    assert rewriter.node("joined") is rewriter.node(old) is rewriter.node(rewriter.node(old))
    assert rewriter.node(old).graph is rewriter.graph
    with pytest.raises(PlanError, match="the graph has no node %nothing"):
        rewriter.node("nothing")


def test_calls_stand_where_they_are_asked_for(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    anchor = rewriter.node("joined")
    after = rewriter.call(aten.neg.default, anchor, after=anchor)
    rewriter.by = "prune"
    before = rewriter.call(aten.abs.default, rewriter.node("wide"), before=anchor)
    order = [node.name for node in rewriter.graph.nodes]
    assert order.index(before.name) == order.index("joined") - 1
    assert order.index(after.name) == order.index("joined") + 1
    assert after.meta == {"path": "model.layers.0"}
    assert before.meta == {"path": "model.layers.0", "by": "prune"}
    assert rewriter.call(aten.neg.default, anchor, after=rewriter.node("seen")).meta == {"by": "prune"}
    with pytest.raises(ValueError, match="say where"):
        rewriter.call(aten.neg.default, anchor)


def test_replaced_nodes_are_forwarded(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    wide = rewriter.node("wide")
    twice = rewriter.call(aten.mul.Tensor, wide, 2, after=wide)
    rewriter.replace(wide, twice)
    assert twice.args[0] is wide
    assert rewriter.node("joined").args[0] is twice
    assert rewriter.node("wide") is rewriter.node(by_hand.nodes["wide"]) is twice
    # A second edit that names the first node acts on what it became.
    again = rewriter.call(aten.neg.default, rewriter.node("wide"), after=rewriter.node("wide"))
    rewriter.replace(rewriter.node("wide"), again)
    assert rewriter.node("wide") is again
    assert again.args[0] is twice
    got = rewriter.finish().module(f64)(ids=IDS)[1]
    x = EMBED.to(f64)[IDS] * -2 + TABLE.to(f64)[torch.arange(3)]
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * GAIN.to(f64)
    assert torch.allclose(got, normed, rtol=1e-12)


def test_some_readers_can_keep_the_old_node(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    norm = rewriter.node("norm")
    negated = rewriter.call(aten.neg.default, norm, after=norm)
    rewriter.replace(norm, negated, keep=lambda user: user.op == "output")
    assert rewriter.node("logits").args[0] is negated
    assert rewriter.node("norm") is norm
    after, places = rewriter.finish(), torch.arange(3).expand(2, 3)
    logits, hidden = expected(IDS, places, torch.ones_like(IDS), f64)
    got = after.module(f64)(ids=IDS)
    assert torch.allclose(got[0], -logits, rtol=1e-12)
    assert torch.allclose(got[1], hidden, rtol=1e-12)
    rewriter.forward(norm, negated)
    assert rewriter.node("norm") is negated


def test_what_is_bypassed_goes_with_its_weights(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    rewriter.bypass(rewriter.node("norm"), rewriter.node("back"))
    assert rewriter.node("norm") is rewriter.node("back")
    after = rewriter.finish()
    assert "norm" not in after.nodes
    assert list(after.weights) == ["embed.weight", "table"]
    assert list(by_hand.weights) == ["embed.weight", "norm.weight", "table"]
    assert [node.name for node in after.output_nodes] == ["shown", "back"]


def test_weights_are_changed_and_added(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    rewriter.set_weight("norm.weight", lambda expr: Affine(expr, 2.0))
    bias = rewriter.add_weight("head.bias", Const(torch.ones(7), bf16), "buffer")
    assert bias.meta["weight"] == "head.bias"
    assert rewriter.weight_node("head.bias") is bias
    placeholders = [node.name for node in rewriter.graph.nodes if node.op == "placeholder"]
    assert placeholders == ["embed_weight", "norm_weight", "table", "head_bias", "ids", "mask", "places"]
    with pytest.raises(PlanError, match=r"already has a weight 'head\.bias'"):
        rewriter.add_weight("head.bias", Const(torch.ones(7), bf16))
    logits = rewriter.node("logits")
    logits.args = (*logits.args, bias)
    after = rewriter.finish()
    assert after.weights["head.bias"].kind == "buffer"
    base = expected(IDS, torch.arange(3).expand(2, 3), torch.ones_like(IDS), f64)[0]
    assert torch.allclose(after.module(f64)(ids=IDS)[0], base * 2 + 1, rtol=1e-10)
    assert Rewriter(by_hand).weights is by_hand.weights


def test_a_weight_may_be_added_to_a_graph_without_any() -> None:
    text = "graphopt 1\ndtype f32\ndim B 1..8 hint 2\ninput $x f32[B, 3] values\n%y = aten.neg.default($x)\nreturn y = %y\n"
    rewriter = Rewriter(make(text))
    added = rewriter.add_weight("scale", Const(torch.tensor(3.0), f32))
    assert next(iter(rewriter.graph.nodes)) is added
    made = rewriter.call(aten.mul.Tensor, rewriter.node("y"), added, after=rewriter.node("y"))
    rewriter.replace(rewriter.node("y"), made)
    after = rewriter.finish()
    assert after.module(None)(x=torch.ones(2, 3))[0].tolist() == [[-3.0] * 3] * 2
    assert after.weights["scale"].kind == "parameter"


def test_inputs_may_be_replaced(by_hand: Program) -> None:
    renamed = tuple(replace(spec, role="values") for spec in by_hand.entry.inputs)
    changed = Rewriter(by_hand).finish(renamed)
    assert [spec.role for spec in changed.entry.inputs] == ["values"] * 3
    assert changed.entry.outputs == by_hand.entry.outputs


# --- shapes --------------------------------------------------------------------------------------------------------


def test_shapes_hold_dimensions_by_name(by_hand: Program) -> None:
    symbols = propagate(Rewriter(by_hand).finish().graph, by_hand.weights, by_hand.dims, by_hand.entry)
    assert list(symbols) == ["B", "S"]
    fresh = Rewriter(by_hand).finish()
    symbols = propagate(fresh.graph, fresh.weights, fresh.dims, fresh.entry)
    shape = fresh.nodes["logits"].meta["val"].shape
    assert [size.node.expr for size in shape[:2]] == [symbols["B"], symbols["S"]]
    assert [size.node.hint for size in shape[:2]] == [2, 5]
    assert shape[2] == 7
    assert fresh.nodes["logits"].meta["val"].dtype == bf16
    assert fresh.nodes["wide"].meta["val"].dtype == f32
    assert fresh.weight_nodes["norm.weight"].meta["val"].shape == (4,)


def test_an_ill_typed_node_is_named(by_hand: Program) -> None:
    rewriter = Rewriter(by_hand)
    rewriter.set_weight("norm.weight", lambda expr: Take(expr, 0, (0, 1)))
    rewriter.set_weight("embed.weight", lambda expr: Take(expr, 1, (0, 1, 2)))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        rewriter.finish()
    assert any("while propagating shapes through node %joined" in note for note in caught.value.__notes__)
