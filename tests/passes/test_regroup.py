"""Regrouping KV heads: surgery equals the same mix done beside the attention, for every packing and position kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.artifact.stock import Stock, find_stock
from graphopt.diagnostics import PlanError, SpecError
from graphopt.frontend import capture_model, capture_pretrained
from graphopt.ir.program import Program
from graphopt.observe import observe
from graphopt.passes.attention.regroup import Regroup
from graphopt.passes.attention.regroup_kv import RegroupKV
from graphopt.passes.width.prune_heads import PruneHeads
from graphopt.passkit import Context, Plan
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.select.options import Amount, Magnitude
from graphopt.views import Views
from tests.tiny import checkpoint, make_model, tokens

SHAPES = ((1, 1), (2, 7), (3, 21))
EIGHT: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 64, "num_hidden_layers": 2}
PACKED = {key: value for key, value in EIGHT.items() if key != "num_key_value_heads"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", EIGHT),
    "bias": ("llama_bias", EIGHT),
    "gqa": ("llama", {**EIGHT, "num_key_value_heads": 4}),
    "tied": ("llama_mha", EIGHT),
    "gpt2": ("gpt2", {"n_head": 8, "n_embd": 64, "n_layer": 2}),
    "neox": ("neox", PACKED),
    "gemma2": ("gemma2", {**EIGHT, "head_dim": 8}),
    "mistral": ("mistral", EIGHT),
    "phi3": ("phi3", EIGHT),
    "qwen3": ("qwen3", EIGHT),
}
WAYS: tuple[dict[str, Any], ...] = (
    {"init": "mean"},
    {"init": "first", "grouping": "similarity"},
    {"init": "svd"},
    {"init": "svd", "grouping": "similarity"},
    {"init": "svd", "weighting": "none"},
)


@cache
def views(name: str) -> Views:
    kind, changes = MODELS[name]
    return Views(capture_model(make_model(kind, **changes)))


def planned(config: RegroupKV, v: Views, layers: tuple[int, ...] = (0, 1)) -> Plan:
    context = Context(v, layers)
    taps = config.observe(context)
    text = [{"input_ids": part} for part in tokens(8, 16).split(4)]
    statistics = observe(v.program, taps, text, dtype=torch.float64, views=v) if taps else None
    return config.plan(Context(v, layers, statistics))


def config(**fields: Any) -> RegroupKV:
    return RegroupKV.model_validate(fields)


def largest_error(a: Program, b: Program) -> float:
    mine, theirs = a.module(torch.float64), b.module(torch.float64)
    worst = 0.0
    for batch, seq in SHAPES:
        given: dict[str, torch.Tensor] = {"input_ids": tokens(batch, seq, seed=seq)}
        real = torch.ones(batch, seq, dtype=torch.bool)
        if batch > 1:
            real[-1, : seq // 3] = False
            given["attention_mask"] = real.long()
        x, y = mine(**given)[0], theirs(**given)[0]
        assert x.shape == y.shape
        worst = max(worst, float((x - y)[real].abs().max() / y[real].abs().max()))
    return worst


def check(v: Views, plan: Plan, count: int) -> Program:
    after = apply_edits(v.program, v, plan.edits)
    assert largest_error(after, emulate_edits(v.program, v, plan.edits)) < 1e-12
    seen = Views(after)
    assert not seen.unseen
    for attention, old in zip(seen.attentions, v.attentions, strict=True):
        assert (attention.heads, attention.kv_heads) == (old.heads, count)
        assert attention.query_group is not None
        assert attention.query_group.size == old.heads // count
    return after


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_every_way_to_share(way: dict[str, Any]) -> None:
    for count in (4, 2, 1):
        check(views("mha"), planned(config(kv_heads=count, **way), views("mha")), count)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mha", "qwen3")])
def test_every_layout_of_heads(name: str) -> None:
    v = views(name)
    check(v, planned(config(kv_heads=2), v), 2)
    check(v, planned(config(kv_heads=2, init="svd", grouping="similarity"), v), 2)


def test_regrouping_twice_and_pruning_after() -> None:
    v = views("mha")
    four = check(v, planned(config(kv_heads=4, init="svd", grouping="similarity"), v), 4)
    again = Views(four)
    two = check(again, planned(config(kv_heads="kv_heads / 2", init="svd"), again), 2)
    narrow = Views(two)
    prune = PruneHeads(keep=Amount.parse("50%"), unit="query", score=Magnitude())
    plan = prune.plan(Context(narrow, (0, 1)))
    assert [a.heads for a in Views(apply_edits(two, narrow, plan.edits)).attentions] == [4, 4]


def test_pruned_groups_then_regrouped() -> None:
    v = views("gqa")
    prune = PruneHeads(keep=Amount.parse("50%"), unit="kv_group", score=Magnitude())
    pruned = Views(apply_edits(v.program, v, prune.plan(Context(v, (0, 1))).edits))
    assert [a.kv_heads for a in pruned.attentions] == [2, 2]
    check(pruned, planned(config(kv_heads=1, init="svd"), pruned), 1)


def test_only_where_is_changed() -> None:
    v = views("mha")
    plan = planned(config(kv_heads=2), v, (1,))
    assert [decline.reason for decline in plan.declines] == ["outside where"]
    after = apply_edits(v.program, v, plan.edits)
    assert [a.kv_heads for a in Views(after).attentions] == [8, 2]
    assert largest_error(after, emulate_edits(v.program, v, plan.edits)) < 1e-12


def test_equal_heads_lose_nothing() -> None:
    model = make_model("llama", **EIGHT)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(8, 8, 64)
                heads.copy_(heads[0].expand_as(heads).clone())
    v = Views(capture_model(model))
    for way in WAYS:
        plan = planned(config(kv_heads=2, **way), v)
        assert largest_error(apply_edits(v.program, v, plan.edits), v.program) < 1e-9


@pytest.mark.parametrize("weighting", ["none", "readers"])
def test_turned_copies_of_a_head_are_shared_exactly(weighting: str) -> None:
    """Heads that differ by angles per frequency (keys) and an orthogonal matrix (values): mean fails, SVD does not."""
    model = make_model("llama", **EIGHT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            keys = layer.self_attn.k_proj.weight.view(8, 2, 4, 64)
            values = layer.self_attn.v_proj.weight.view(8, 8, 64)
            first = torch.view_as_complex(torch.stack([keys[0, 0], keys[0, 1]], dim=-1))
            for j in range(8):
                turned = torch.polar(torch.ones(4), torch.rand(4, generator=generator) * 6)[:, None] * first
                keys[j] = torch.stack([turned.real, turned.imag])
                values[j] = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0] @ values[0].clone()
    v = Views(capture_model(model))
    error = {}
    for init in ("mean", "svd"):
        plan = planned(config(kv_heads=2, init=init, weighting=weighting), v)
        error[init] = largest_error(apply_edits(v.program, v, plan.edits), v.program)
    assert error["svd"] < 1e-4 < 0.05 < error["mean"]


def test_svd_is_nearer_than_mean_on_calibration_text() -> None:
    model = make_model("llama", **EIGHT)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(8, 8, 64)
                noise = 0.4 * torch.randn(heads.shape, generator=generator) * 0.25
                mixed = torch.randn(8, 4, 4, generator=generator) * 0.5
                first = heads[0].view(4, 2, 64).clone()
                heads.copy_(torch.einsum("hab,bcx->hacx", mixed, first).reshape(8, 8, 64) + noise)
    v = Views(capture_model(model))
    text = {"input_ids": tokens(8, 16)}
    reference = v.program.module(torch.float64)(**text)[0]
    errors = {}
    for init in ("mean", "svd"):
        plan = planned(config(kv_heads=2, init=init), v)
        after = apply_edits(v.program, v, plan.edits[:1])
        errors[init] = float((after.module(torch.float64)(**text)[0] - reference).square().mean())
    assert errors["svd"] <= errors["mean"]


def test_stock_config_says_it(tmp_path: Path) -> None:
    program = capture_pretrained(checkpoint(tmp_path, "llama", **EIGHT))
    v = Views(program)
    plan = config(kv_heads="heads / 4").plan(Context(v, (0, 1)))
    stock = find_stock(apply_edits(program, v, plan.edits))
    assert isinstance(stock, Stock)
    assert stock.config.num_key_value_heads == 2


def test_counts_that_do_not_divide() -> None:
    with pytest.raises(PlanError, match="regroup_kv cannot make 3 kv heads out of 8") as caught:
        config(kv_heads=3).plan(Context(views("mha"), (0, 1)))
    assert "kv_heads that divide 8: 1, 2, 4, 8" in caught.value.notes
    assert caught.value.diagnostics[0].help == ("use kv_heads: 2",)
    with pytest.raises(PlanError, match="cannot make 16"):
        config(kv_heads="2 * heads").plan(Context(views("mha"), (0, 1)))
    with pytest.raises(SpecError, match="not an integer"):
        config(kv_heads="heads / 3").plan(Context(views("mha"), (0, 1)))


def test_normalised_keys_share_only_by_choice() -> None:
    v = views("qwen3")
    for init in ("mean", "svd"):
        plan = planned(config(kv_heads=2, init=init), v)
        assert not plan.edits
        assert all("normalised after the projection" in decline.reason for decline in plan.declines)
    check(v, planned(config(kv_heads=2, init="first", grouping="similarity"), v), 2)


def test_declines_and_errors() -> None:
    v = views("mha")
    assert {d.reason for d in config(kv_heads="kv_heads").plan(Context(v, (0, 1))).declines} == {
        "it already has 8 KV heads"
    }
    with pytest.raises(PlanError, match="needs calibration text"):
        config(kv_heads=2, init="svd").plan(Context(v, (0, 1)))
    with pytest.raises(PlanError, match="rope: none is not legal"):
        planned(config(kv_heads=2, init="svd", rope="none"), v)
    plan = planned(config(kv_heads=2, init="svd", rope="commuting"), views("gpt2"))
    assert {d.reason for d in plan.declines} == {"it has no rotary embedding to commute with; leave rope out"}
    check(views("gpt2"), planned(config(kv_heads=2, init="svd", rope="none"), views("gpt2")), 2)


def test_an_edit_as_data() -> None:
    v = views("mha")
    edit = planned(config(kv_heads=2), v).edits[0]
    assert isinstance(edit, Regroup)
    assert not edit.moved
    assert edit.to_json()["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert edit.describe().endswith("8 KV heads to 2 by mean")


def test_biased_masks_forbid_moving_heads() -> None:
    """BLOOM merges batch and heads in its own code, which capture takes out; its mask differs from head to head."""
    v = Views(capture_model(make_model("bloom", n_head=8, hidden_size=64, n_layer=2)))
    check(v, planned(config(kv_heads=2, init="svd"), v), 2)
    moved = planned(config(kv_heads=2, init="svd", grouping="similarity"), v)
    assert {decline.reason for decline in moved.declines} <= {
        "its mask differs from head to head, so that heads cannot change places"
    }
