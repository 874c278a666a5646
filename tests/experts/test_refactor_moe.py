"""Dense feed-forwards as banks of experts: the same function, the stated routing, and checkpoints that stock classes load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from graphopt.artifact import save
from graphopt.cost import cost
from graphopt.diagnostics import GraphoptError
from graphopt.ir.grouped import group, matrix_times_rows, rows_times_matrix
from graphopt.ir.program import Program
from graphopt.observe import Activity, observe
from graphopt.observe.taps import Tap
from graphopt.passes.experts.partition import alike, clustered, in_order, masked
from graphopt.passes.experts.routers import fitted, missed, trained
from graphopt.passkit import PassRegistry
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import Refused, trial
from graphopt.views import Views
from tests.tiny import program, tokens


def config(**options: Any) -> Any:
    return PassRegistry().get("refactor_moe").model_validate_json(json.dumps(options))


def refactored(model: Program, **options: Any) -> Program:
    found = trial(config(**options), model)
    assert found.plan.edits, found.plan.declines
    return found.after


def same(one: Program, other: Program) -> float:
    ids = tokens(2, 9)
    mine, theirs = (p.module(torch.float64)(input_ids=ids)[0] for p in (one, other))
    return float((mine - theirs).abs().max() / theirs.abs().max())


# Gated, plain with biases and a transposed layout, packed, biased and gated.
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "llama_bias"])
@pytest.mark.parametrize("experts", [4, 5])
def test_all_experts_together_are_the_dense_model(name: str, experts: int) -> None:
    dense = program(name)
    made = refactored(dense, experts=experts)
    assert same(made, dense) < 1e-13
    banks = Views(made).experts
    assert [(bank.experts, bank.top_k) for bank in banks] == [(experts, experts)] * 3
    assert not Views(made).feed_forwards


def test_one_expert_less_is_another_model() -> None:
    dense = program("llama")
    assert same(refactored(dense, experts=4, router="random", choose={"kind": "top", "k": 3}), dense) > 1e-3


def test_shared_neurons_and_experts_together_are_the_dense_model() -> None:
    dense = program("gpt2")
    made = refactored(dense, experts=3, shared="25%", partition="kmeans", weights="one")
    assert same(made, dense) < 1e-13
    assert all(len(bank.shared) == 1 for bank in Views(made).experts)


def test_overlapping_experts_are_masks_of_the_dense_model() -> None:
    found = trial(
        config(experts=3, partition={"kind": "masks", "keep": "60%"}, router="static", choose="rank", weights="one"),
        program("llama"),
    )
    edit = found.plan.edits[0]
    kept = len(edit.shared) + len(edit.groups[0])
    assert all(len(edit.shared) + len(one) == kept for one in edit.groups)
    assert same(found.after, found.emulated) < 1e-13


def test_one_routing_serves_all_layers() -> None:
    made = refactored(program("llama"), experts=3, router="tokens", choose={"kind": "top", "k": 2})
    choices = [node for node in made.graph.graph.nodes if node.target is torch.ops.aten.topk.default]
    assert len(choices) == 1
    order = list(made.graph.graph.nodes)
    assert order.index(choices[0]) < order.index(Views(made).blocks[0].attentions[0].core)
    assert len({bank.up.index for bank in Views(made).experts}) == 1


def test_flops_are_those_of_the_chosen_experts() -> None:
    dense, sizes = program("llama"), {"B": 2, "S": 9}
    made = {k: refactored(dense, experts=4, router="random", choose={"kind": "top", "k": k}) for k in (1, 2, 4)}
    flops = {k: cost(p).at(**sizes)["flops"] for k, p in made.items()}
    each = 3 * 2 * 2 * 9 * (3 * 14 * 32)  # Layers, multiply and add, tokens, one expert's three matrices.
    assert flops[2] - flops[1] == each
    assert flops[4] - cost(dense).at(**sizes)["flops"] == 3 * 2 * 2 * 9 * 4 * 32
    mode = FlopCounterMode(display=False)
    with mode:
        made[2].module()(input_ids=tokens(2, 9))
    counted = mode.get_flop_counts()["Global"]
    products = [torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm]
    products_of_dense = FlopCounterMode(display=False)
    with products_of_dense:
        dense.module()(input_ids=tokens(2, 9))
    before = products_of_dense.get_flop_counts()["Global"]
    gap = sum(counted.get(p, 0) for p in products) - sum(before.get(p, 0) for p in products)
    assert gap == flops[2] - cost(dense).at(**sizes)["flops"]


def test_grouped_products_are_gathered_ones() -> None:
    bank, index = torch.randn(5, 7, 3, dtype=torch.float64), torch.tensor([4, 0, 0, 2, 4, 4])
    column, row = torch.randn(6, 3, 1, dtype=torch.float64), torch.randn(6, 1, 7, dtype=torch.float64)
    groups = group(index, 5)
    assert groups.spans is not None
    assert [expert for expert, _, _ in groups.spans] == [0, 2, 4]
    torch.testing.assert_close(matrix_times_rows(bank, groups, column), bank[index] @ column)
    torch.testing.assert_close(rows_times_matrix(row, bank, groups), row @ bank[index])


def test_a_refactored_llama_is_a_stock_mixtral(tmp_path: Path) -> None:
    # Rows of an expert's matrices are a multiple of 16 bytes, as transformers' grouped product wants them.
    made = refactored(program("llama"), experts=7, router="random", choose={"kind": "top", "k": 2})
    report = save(made, tmp_path / "out", format="transformers")
    assert report.format == "transformers"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (7, 2)
    ids = tokens(2, 9)
    expected = made.module(torch.float32)(input_ids=ids)[0]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_shared_neurons_behind_a_gate_are_a_stock_qwen2_moe(tmp_path: Path) -> None:
    options = {"experts": 3, "shared": "62%", "gate": True, "router": "random", "choose": {"kind": "top", "k": 2}}
    made = refactored(program("llama"), **options)
    save(made, tmp_path / "out", format="transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert (model.config.num_experts, model.config.shared_expert_intermediate_size) == (3, 34)
    ids = tokens(2, 9)
    expected = made.module(torch.float32)(input_ids=ids)[0]
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_gate_of_zeros_changes_nothing() -> None:
    made = refactored(program("gpt2"), experts=3, shared="25%", gate=True, weights="one")
    assert same(made, program("gpt2")) < 1e-13
    with pytest.raises(Refused, match="they share nothing"):
        refactored(program("gpt2"), experts=3, gate=True)


def test_a_later_pass_cuts_the_experts_neurons() -> None:
    made = refactored(program("llama"), experts=4)
    cut = trial(PassRegistry().get("prune_neurons").model_validate_json('{"keep": "50%"}'), made)
    assert len(cut.plan.edits) == 3
    assert same(cut.after, cut.emulated) < 1e-12
    assert Views(cut.after).experts[0].neurons == 7


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    where = torch.randperm(24, generator=generator) % 4
    causes = torch.rand(500, 4, generator=generator, dtype=torch.float64)
    a = causes[:, where] + 0.05 * torch.rand(500, 24, generator=generator, dtype=torch.float64)
    seen = Activity(500, a.mean(0), a.T @ a, torch.eye(2), torch.zeros(2, 24))
    for centred in (True, False):
        groups = clustered(alike(seen, centred), list(range(24)), 4, seed=0)
        assert [len(one) for one in groups] == [6] * 4
        assert all(len({int(where[i]) for i in one}) == 1 for one in groups)


def test_groups_share_neurons_out() -> None:
    assert in_order(list(range(7)), 3) == ((0, 1, 2), (3, 4), (5, 6))
    shared, private = masked(torch.tensor([[3.0, 2, 1, 0], [3.0, 0, 1, 2]]), 2)
    assert shared == (0,)
    assert private == ((1,), (3,))


def test_a_fitted_router_prefers_the_expert_that_adds_most() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    a = torch.cat([x.clamp_min(0), (-x).clamp_min(0)], 1)[:, [0, 5]]
    seen = Activity(400, a.mean(0), a.T @ a, x.T @ x, x.T @ a)
    scores = x @ fitted(seen, torch.ones(2, dtype=torch.float64), ((0,), (1,)), 1e-3, 0.1).T
    decided = x[:, 0].abs() > 0.5
    assert (scores.argmax(1) == a.argmax(1))[decided].float().mean() > 0.95
    assert scores.std() == pytest.approx(0.1, rel=0.1)


def _neurons() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[tuple[int, ...], ...]]:
    """Tokens, their neurons, a down projection and four groups of three neurons."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64)
    hidden = (x @ torch.randn(6, 12, generator=generator, dtype=torch.float64)).clamp_min(0)
    down = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    return x, hidden, down, tuple(tuple(range(i, i + 3)) for i in range(0, 12, 3))


def test_the_experts_that_a_token_would_miss_leave_least_without_them() -> None:
    _, hidden, down, groups = _neurons()
    added = torch.stack([hidden[:, list(group)] @ down[:, list(group)].T for group in groups], 1)
    sizes, wanted, costs = missed(hidden, down, groups, 1)
    torch.testing.assert_close(sizes, added.square().sum(-1))
    left = (added.sum(1, keepdim=True) - added).square().sum(-1)
    assert torch.equal(wanted.argmax(-1), left.argmin(-1))
    common = 2 * (added @ added.mT)[torch.arange(len(left)), wanted.argmax(-1)]
    swapped = left - left.amin(-1, keepdim=True) + common
    assert bool((costs >= 0).all())
    torch.testing.assert_close(costs[(wanted == 0) & (costs > 0)], swapped[(wanted == 0) & (costs > 0)])
    for count in (2, 3, 4):
        more = missed(hidden, down, groups, count)[1]
        assert bool((more.sum(-1) == count).all())
        assert bool((more >= wanted).all())
        wanted = more


@pytest.mark.parametrize("count", [1, 2, 3])
def test_mistakes_of_a_trained_router_cost_less_than_those_of_a_fitted_one(count: int) -> None:
    x, hidden, down, groups = _neurons()
    a = hidden.abs()
    seen = Activity(len(x), a.mean(0), a.T @ a, x.T @ x, x.T @ a)
    _, wanted, costs = missed(hidden, down, groups, count)

    def cost(router: torch.Tensor) -> float:
        chosen = torch.zeros_like(wanted).scatter(1, (x @ router.T).topk(count).indices, 1.0)
        return float((costs * (chosen != wanted)).sum())

    router = trained(x, hidden, down, groups, count, 50, 1e-3, 0.1)
    assert cost(router) < cost(fitted(seen, down.norm(dim=0), groups, 1e-3, 0.1))
    assert (x @ router.T).std() == pytest.approx(0.1, rel=0.1)


def test_activity_is_the_sum_of_what_ran() -> None:
    dense = program("gpt2")
    view = Views(dense).feed_forwards[0]
    batches = [{"input_ids": tokens(2, 7)}, {"input_ids": tokens(1, 5, seed=1)}]
    taps = [Tap(view.down.x.name, "activity", "last", view.up.x.name), Tap(view.down.x.name, "grouped")]
    found = observe(dense, taps, batches, dtype=torch.float64)
    seen, by_sample = found.activity(view.down.x.name, view.up.x.name), found.grouped(view.down.x.name)
    assert seen.count == 19
    torch.testing.assert_close(by_sample.sums.sum(0), seen.mean * 19)
    assert by_sample.counts.tolist() == [7, 7, 5]
    assert bool((seen.together.diagonal() * 19 >= (seen.mean * 19) ** 2 - 1e-9).all())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"experts": 4, "choose": {"kind": "top", "k": 5}}, "too_many_experts"),
        ({"experts": 4, "choose": {"kind": "top", "k": 2}}, "scores_alike"),
        ({"experts": 4, "partition": "masks", "shared": "10%", "router": "static"}, "shared_twice"),
    ],
)
def test_what_cannot_be_is_refused_in_words(options: dict[str, Any], code: str) -> None:
    with pytest.raises(Refused) as refused:
        _ = trial(config(**options), program("llama")).plan
    cause = refused.value.__cause__
    assert isinstance(cause, GraphoptError)
    assert cause.code == code


def test_what_is_no_sum_over_neurons_is_declined() -> None:
    narrow = build(Shape(layers=2, heads=2, kv_heads=2, head_dim=4, hidden=8, neurons=7))
    plan = trial(config(experts=4), narrow).plan
    assert not plan.edits
    assert all("fewer than two" in decline.reason for decline in plan.declines)
    again = trial(config(experts=2), refactored(narrow, experts=3)).plan
    assert all("already" in decline.reason for decline in again.declines)
