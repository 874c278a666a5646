"""Merging, routing, contrast and momentum of experts, and mixtures of heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graphopt.cost import cost
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Affine, Cat, Take
from graphopt.passes.attention.mix_heads import MixHeads
from graphopt.passes.cache.bound_cache import BoundCache
from graphopt.passes.experts.add_momentum import AddMomentum
from graphopt.passes.experts.merge_experts import MergeExperts
from graphopt.passes.experts.reroute import Reroute
from graphopt.passes.experts.self_contrast import SelfContrast
from graphopt.passkit import Pass
from graphopt.spec import Percent
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import Trial, given, trial
from graphopt.views import Views
from tests.tiny import program

SHAPE = Shape(
    layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8, neurons=6, vocabulary=11, experts=4, chosen=2, gated=True,
    activation="silu", positions="rotary",
)  # fmt: skip
HELD = (
    "surgery_equals_emulation",
    "nothing_left_behind",
    "runs_at_other_shapes",
    "cost_is_counted",
    "plan_is_complete",
)


def made(kind: type[Pass], **options: Any) -> Pass:
    """A pass as a spec would write it."""
    return kind.model_validate(options)


def run(one: Program, seed: int = 0) -> torch.Tensor:
    """Logits of random tokens in float64."""
    return one.module(torch.float64)(**given(one, {"B": 2, "S": 9}, seed))[0]


def check(config: Pass, one: Program) -> Trial:
    """The trial of a pass that edits, held to the laws."""
    case = trial(config, one)
    assert case.plan.edits
    for law in HELD:
        LAWS[law](config, one)
    return case


def doubled(one: Program) -> Program:
    """The program with experts 2 and 3 equal to 0 and 1; the router still tells them apart."""
    rewriter = Rewriter(one)
    for bank in Views(one).experts:
        for name in {bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight}:
            rewriter.set_weight(name, lambda expr: Cat((Take(expr, 0, (0, 1)), Take(expr, 0, (0, 1))), 0))
    return rewriter.finish()


@pytest.mark.parametrize("alike", ["weights", "outputs"])
@pytest.mark.parametrize("weigh", ["equal", "frequency", "mass"])
def test_merging_equal_experts_changes_nothing(alike: str, weigh: str) -> None:
    twice = doubled(build(SHAPE))
    case = check(made(MergeExperts, keep="experts / 2", alike=alike, weigh=weigh), twice)
    assert [edit.to_json()["sets"] for edit in case.plan.edits] == [[[0, 2], [1, 3]]] * 3
    assert case.after.weights.parameters < twice.weights.parameters
    torch.testing.assert_close(run(case.after), run(twice), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_merged_experts_are_their_mean(name: str) -> None:
    case = check(made(MergeExperts, keep="experts / 2", alike="outputs", weigh="mass"), program(name))
    assert float((run(case.after) - run(case.program)).abs().max()) > 1e-3
    for bank in case.views.experts:
        assert case.after.weights[bank.down.weight].expr.shape[0] == bank.experts // 2


def test_experts_that_are_scored_alike_are_joined() -> None:
    # Experts 0 and 2, and 1 and 3, have scores that differ by a factor alone.
    one = build(SHAPE)
    rewriter = Rewriter(one)

    def halves(expr: Any) -> Any:
        first = Take(expr, 0, (0, 1))
        return Cat((first, Affine(first, 0.5)), 0)

    for bank in Views(one).experts:
        assert bank.router is not None
        rewriter.set_weight(bank.router.weight, halves)
    case = check(made(MergeExperts, keep="experts / 2", alike="routing"), rewriter.finish())
    assert [edit.to_json()["sets"] for edit in case.plan.edits] == [[[0, 2], [1, 3]]] * 3


def test_one_expert_may_be_left() -> None:
    case = check(made(MergeExperts, keep=1), build(SHAPE))
    assert {one.reason for one in Views(case.after).unseen} == {"it has a single expert"}


def test_outputs_are_compared_and_not_weights_alone() -> None:
    # Neurons in another order: other weights, the same function.
    one = build(SHAPE)
    rewriter = Rewriter(one)
    turned = (5, 4, 3, 2, 1, 0)
    for bank in Views(one).experts:
        for linear in (bank.up, bank.gate, bank.down):
            assert linear is not None
            axis = linear.in_axis if linear is bank.down else linear.out_axis

            def change(expr: Any, axis: int = axis) -> Any:
                other = Take(Take(expr, 0, (0, 1)), axis, turned)
                return Cat((Take(expr, 0, (0, 1)), other), 0)

            rewriter.set_weight(linear.weight, change)
    twins = rewriter.finish()
    case = check(made(MergeExperts, keep="experts / 2", alike="outputs"), twins)
    assert [edit.to_json()["sets"] for edit in case.plan.edits] == [[[0, 2], [1, 3]]] * 3
    other = trial(made(MergeExperts, keep="experts / 2"), twins)
    assert [edit.to_json()["sets"] for edit in other.plan.edits] != [[[0, 2], [1, 3]]] * 3


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("options", [{"top_k": 1}, {"rank": 2}, {"below": 0.8}, {"below": "median"}])
def test_other_routes_equal_masked_ones(name: str, options: dict[str, Any]) -> None:
    case = check(made(Reroute, **options), program(name))
    assert float((run(case.after) - run(case.program)).abs().max()) > 1e-3
    at = {"B": 2, "S": 9}
    flops = cost(case.program).at(**at)["flops"] - cost(case.after).at(**at)["flops"]
    per_choice = 0
    for bank in case.views.experts:
        matrices = {bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight}
        sizes = [torch.Size(case.program.weights[name].expr.shape[1:]).numel() for name in matrices]
        per_choice += 2 * sum(sizes) * at["B"] * at["S"]
    assert flops == (0 if "below" in options else per_choice)


def test_the_best_choice_alone_is_what_dropping_all_others_leaves() -> None:
    one = program("mixtral")
    best = run(trial(made(Reroute, top_k=1), one).after)
    torch.testing.assert_close(run(trial(made(Reroute, below=1.0), one).after), best, rtol=1e-12, atol=1e-12)
    # Mixtral's shares sum to 1.
    torch.testing.assert_close(run(trial(made(Reroute, rank=1), one).after), best, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_dropped_choices_are_not_computed(name: str) -> None:
    def flops(options: dict[str, Any]) -> int:
        after = trial(made(Reroute, **options), one).after
        run_ = after.module(torch.float64)
        mode = FlopCounterMode(display=False)
        with torch.no_grad(), mode:
            run_(**given(one, {"B": 2, "S": 9}, 0))
        return int(mode.get_total_flops())

    one = program(name)
    best, half, all_ = (flops(options) for options in ({"top_k": 1}, {"below": 0.8}, {"below": 1e-9}))
    assert flops({"below": 1.0}) == best < half < all_


def test_the_largest_tokens_keep_all_their_choices() -> None:
    one = program("mixtral")
    LAWS["yaml_round_trip"](made(Reroute, below=1.0, protect=Percent.parse("25%")), one)
    for share, dropped in (("100%", 0.0), ("25%", 0.75), ("0%", 1.0)):
        case = trial(made(Reroute, below=1.0, protect=Percent.parse(share)), one)
        LAWS["surgery_equals_emulation"](case.config, one)
        LAWS["generation_is_kept"](case.config, one)
        found = [noted["dropped"] for noted in case.plan.notes["dropped"].values()]
        # The largest token of all is protected even where none shall be.
        assert found == pytest.approx([dropped] * 2, abs=0.06)


def test_fewer_choices_are_counted_as_such() -> None:
    after = trial(made(Reroute, top_k=1), build(SHAPE)).after
    assert [bank.top_k for bank in Views(after).experts] == [1] * 3
    assert {d.reason for d in trial(made(SelfContrast, rank=2), after).plan.declines} == {
        "it chooses 1 experts for each token, not 2"
    }


def test_routes_that_change_nothing_are_declined() -> None:
    one = program("mixtral")
    for options, reason in (
        ({"top_k": 2}, "keeps all 2"),
        ({"below": 0.0}, "less than nothing"),
        ({"rank": 3}, "not 3"),
    ):
        plan = trial(made(Reroute, **options), one).plan
        assert not plan.edits
        assert all(reason in decline.reason for decline in plan.declines)


def test_half_of_all_second_choices_lie_below_the_median() -> None:
    case = trial(made(Reroute, below="median"), program("mixtral"))
    noted = case.plan.notes["dropped"]
    assert len(noted) == 2
    assert all(abs(found["dropped"] - 0.5) < 0.1 and 0 < found["below"] < 1 for found in noted.values())


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, experts=4, chosen=3, tied=True)])
def test_contrast_equals_two_runs(shape: Shape) -> None:
    one = build(shape)
    config = made(SelfContrast, rank=2, alpha=0.3, beta=0.7)
    case = check(config, one)
    LAWS["generation_is_kept"](config, one)
    LAWS["save_and_load_keep_bits"](config, one)
    strong, weak = run(one), run(trial(made(Reroute, rank=2), one).after)
    near = strong >= strong.amax(-1, keepdim=True) + torch.tensor(0.3).double().log()
    wanted = torch.where(near, 1.7 * strong - 0.7 * weak, torch.tensor(-1e4, dtype=torch.float64))
    torch.testing.assert_close(run(case.after), wanted, rtol=1e-9, atol=1e-9)
    assert case.after.weights.parameters == one.weights.parameters
    assert bool((near.sum(-1) > 1).any())


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"alpha": 1.0, "beta": 0.9}])
def test_contrast_of_nothing_keeps_the_greedy_choice(options: dict[str, float]) -> None:
    one = build(SHAPE)
    found = run(trial(made(SelfContrast, **options), one).after)
    assert torch.equal(found.argmax(-1), run(one).argmax(-1))


def test_contrast_with_itself_keeps_the_greedy_choice() -> None:
    one = build(replace(SHAPE, chosen=1))
    case = trial(made(SelfContrast, rank=1, beta=3.0), one)
    # The share of one choice is not 1 here, so both runs differ; with the share as it is they do not.
    assert case.plan.edits
    program_ = program("mixtral")
    only = trial(made(Reroute, top_k=1), program_).after
    found = trial(made(SelfContrast, rank=1, beta=3.0), only).after
    assert torch.equal(run(found).argmax(-1), run(only).argmax(-1))


@pytest.mark.parametrize(
    "options", [{"momentum": 0.6}, {"momentum": 0.3, "step": -1.0}, {"momentum": 0.0, "step": 0.5}]
)
def test_momentum_is_its_closed_form(options: dict[str, float]) -> None:
    for one in (build(SHAPE), program("gpt_oss")):
        case = check(made(AddMomentum, **options), one)
        assert float((run(case.after) - run(one)).abs().max()) > 1e-3
        assert len(case.plan.edits) == len(case.views.experts)


def test_no_momentum_is_the_model_itself() -> None:
    plan = trial(made(AddMomentum, momentum=0.0), build(SHAPE)).plan
    assert not plan.edits
    assert {decline.reason for decline in plan.declines} == {"momentum 0 and step 1 are what it does"}


def test_momentum_leaks_nothing_between_rows_and_steps() -> None:
    config = made(AddMomentum, momentum=0.5)
    one = build(SHAPE)
    LAWS["generation_is_kept"](config, one)
    after = trial(config, one).after.module(torch.float64)
    inputs = given(one, {"B": 3, "S": 7}, 0)
    whole = after(**inputs)[0]
    for row in range(3):
        alone = after(**{name: value[row : row + 1] for name, value in inputs.items()})[0]
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["query_norm", "router"])
@pytest.mark.parametrize("unit", ["query", "kv_group"])
def test_mixed_heads_are_masked_heads(by: str, unit: str) -> None:
    for one in (build(SHAPE), program("llama")):
        keep, shared = ("kv_heads", "kv_heads - 1") if unit == "kv_group" else ("heads - 1", "heads / 4")
        if unit == "kv_group" and by == "query_norm":
            keep, shared = "kv_heads - 1", None  # type: ignore[assignment]
        config = made(MixHeads, keep=keep, shared=shared, unit=unit, by=by)
        case = check(config, one)
        LAWS["save_and_load_keep_bits"](config, one)
        LAWS["generation_is_kept"](config, one)
        assert len(case.plan.edits) == len(case.views.attentions)


def test_a_router_of_zeros_over_all_heads_is_the_model_itself() -> None:
    one = build(SHAPE)
    for shared in (None, "heads / 2"):
        config = made(MixHeads, keep="heads", shared=shared, by="router")
        case = check(config, one)
        torch.testing.assert_close(run(case.after), run(one), rtol=1e-12, atol=1e-12)
        LAWS["gradients_flow"](config, one)


def test_as_many_heads_count_as_are_kept() -> None:
    case = trial(made(MixHeads, keep=3, shared=1), build(SHAPE))
    rewriter = Rewriter(case.after)
    gates = [n for n in case.after.graph.graph.nodes if n.target is torch.ops.aten.constant_pad_nd.default]
    assert len(gates) == 3
    for i, gate in enumerate(gates):
        rewriter.add_output(f"gate{i}", rewriter.node(gate))
    _, *found = rewriter.finish().module(torch.float64)(**given(case.program, {"B": 2, "S": 9}, 0))
    for gate in found:
        assert gate.shape == (2, 9, 4)
        assert bool((gate.sum(-1) == 3).all())
        assert bool((gate[..., 0] == 1).all())
    assert len({tuple(row) for row in found[0].reshape(-1, 4).tolist()}) > 1


def test_heads_without_a_choice_are_refused() -> None:
    with pytest.raises(PlanError, match="leaves no choice"):
        made(MixHeads, keep="heads / 2", shared="heads / 2").plan(trial(made(MixHeads, keep=1), build(SHAPE)).context)


def test_a_router_of_one_rank_can_be_trained() -> None:
    one = build(SHAPE)
    LAWS["gradients_flow"](made(Reroute, rank=2), one)
    after = trial(made(Reroute, rank=2), one).after
    runner: Any = after.module(torch.float64)
    names = [node.meta["weight"] for node in after.graph.graph.nodes if "weight" in node.meta]
    place = names.index("layers.0.feed_forward.router.weight")
    router = runner.values[place] = runner.values[place].clone().requires_grad_()
    runner(**given(one, {"B": 2, "S": 9}, 0))[0].square().sum().backward()
    assert float(router.grad.abs().max()) > 1e-6


ALONE = replace(SHAPE, kv_heads=4)
SEEING = [
    (SHAPE, {"unit": "kv_group", "keep": 1}),
    (SHAPE, {"unit": "kv_group", "keep": 1, "by": "router"}),
    (ALONE, {"keep": 3, "shared": 1, "by": "router"}),
    (ALONE, {"experts": 2, "keep": 1}),
    (replace(ALONE, window=3, causal=False, positions="none"), {"keep": 2}),
]


@pytest.mark.parametrize(("shape", "options"), SEEING)
def test_who_takes_a_head_sees_those_that_took_it(shape: Shape, options: dict[str, Any]) -> None:
    one = build(shape)
    config = made(MixHeads, attends="routed", **options)
    case = check(config, one)
    for law in ("save_and_load_keep_bits", "generation_is_kept", "gradients_flow"):
        LAWS[law](config, one)
    everyone = trial(made(MixHeads, **options), one).after
    # A router of zeros lets all tokens take the same heads.
    assert (float((run(case.after) - run(everyone)).abs().max()) > 1e-3) == ("by" not in options)


def test_a_head_attends_as_if_the_others_tokens_were_not_there() -> None:
    case = trial(made(MixHeads, attends="routed", keep=2), build(replace(ALONE, layers=1, positions="none")))
    rewriter = Rewriter(case.after)
    core = next(n for n in case.after.graph.graph.nodes if n.target is torch.ops.graphopt.attention.default)
    (gated,) = core.users
    for name, node in (*zip("qkv", core.args, strict=False), ("made", gated)):
        rewriter.add_output(name, rewriter.node(node))
    rewriter.add_output("gate", rewriter.node(gated.args[1]))
    _, q, k, v, found, gate = rewriter.finish().module(torch.float64)(**given(case.program, {"B": 1, "S": 9}, 0))
    size = k.shape[-1] - 1
    for head in range(4):
        here = gate[0, head, :, 0] > 0
        assert 0 < int(here.sum()) < 9
        taken = [x[:, head : head + 1, here, :size] for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(*taken, is_causal=True)
        torch.testing.assert_close(found[:, head : head + 1, here], wanted, rtol=1e-12, atol=1e-12)
        assert not found[:, head, ~here].any()


def test_no_mean_stands_for_keys_of_which_some_hide() -> None:
    routed = trial(made(MixHeads, attends="routed", keep=2), build(ALONE)).after
    plan = trial(made(BoundCache, sink=1, recent=2, compensate=True), routed).plan
    assert plan.declines
    assert not plan.edits
    assert all("hide" in decline.reason for decline in plan.declines)
    assert trial(made(BoundCache, sink=1, recent=2), routed).plan.edits


def test_all_heads_by_a_router_of_zeros_see_all_tokens() -> None:
    one = build(ALONE)
    case = check(made(MixHeads, attends="routed", keep="heads", by="router"), one)
    torch.testing.assert_close(run(case.after), run(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attends", ["all", "routed"])
def test_sequences_choose_heads_as_one(attends: str) -> None:
    one = build(ALONE)
    case = check(made(MixHeads, attends=attends, each="sequence", keep=2), one)
    inputs = given(one, {"B": 1, "S": 9}, 0)
    gates = [n for n in case.after.graph.graph.nodes if n.target is torch.ops.aten.scatter.value]
    rewriter = Rewriter(case.after)
    for i, gate in enumerate(gates):
        rewriter.add_output(f"gate{i}", rewriter.node(gate))
    _, *found = rewriter.finish().module(torch.float64)(**inputs)
    assert all(bool((gate == gate[:, :1]).all()) for gate in found)
    assert all(bool((gate.sum(-1) == 2).all()) for gate in found)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"keep": 1}, "each with keys of its own"),
        ("llama", {"keep": 1, "experts": 3}, "make no 3 groups"),
        ("gemma2", {"keep": 1, "unit": "kv_group"}, "capped"),
    ],
)
def test_tokens_that_cannot_be_hidden_are_declined(name: str, options: dict[str, Any], reason: str) -> None:
    plan = trial(made(MixHeads, attends="routed", **options), program(name)).plan
    assert not plan.edits
    assert all(reason in decline.reason for decline in plan.declines)
