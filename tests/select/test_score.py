"""Scores against the formulas of their papers, computed plainly."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from graphopt.diagnostics import ArtifactError, PlanError
from graphopt.ir.program import Program
from graphopt.ir.weights import MemorySource
from graphopt.observe import Statistics, observe
from graphopt.select.options import Activation, Fluctuation, Magnitude, Order, TaylorScore
from graphopt.select.score import AnyScore, score, taps
from graphopt.views import UnitGroup, Views, unit_groups
from tests.tiny import program, tokens

FAMILIES = ("query", "kv_group", "neuron", "hidden")


@cache
def views(name: str) -> Views:
    return Views(program(name))


def text(program: Program) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in tokens(6, 16).split(2)]


def scores(views: Views, group: UnitGroup, options: AnyScore, normalise: str = "none") -> torch.Tensor:
    return score(group, views, watched(views, group, options), options, normalise)


def watched(views: Views, group: UnitGroup, options: AnyScore) -> Statistics:
    return observe(views.program, taps(group, views, options), text(views.program), dtype=torch.float64, views=views)


def weight(program: Program, name: str) -> torch.Tensor:
    return program.weights.evaluate(name, torch.float64)


def changed(program: Program, **factors: tuple[torch.Tensor, int]) -> Program:
    """The program with some weights scaled along an axis; double underscores stand for dots."""
    source = program.weights.source
    assert isinstance(source, MemorySource)
    tensors = {name: tensor.to(torch.float64) for name, tensor in source.tensors.items()}
    for name, (factor, axis) in factors.items():
        key = name.replace("__", ".")
        shape = [-1 if i == axis else 1 for i in range(tensors[key].dim())]
        tensors[key] = tensors[key] * factor.reshape(shape)
    return dataclasses.replace(program, weights=dataclasses.replace(program.weights, source=MemorySource(tensors)))


@pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
def test_fluctuation_of_neurons_is_flaps(metric: str) -> None:
    v = views("llama")
    group = unit_groups(v, "neuron")[1]
    options = Fluctuation(metric=metric)
    moments = watched(v, group, options).moments(group.consumers[0].x)
    columns = weight(v.program, "model.layers.1.mlp.down_proj.weight")
    want = {
        "wifv": moments.variance * columns.square().sum(0),
        "ifv": moments.variance,
        "wifn": columns.abs().mean(0) * (moments.square_mean * moments.count).sqrt(),
    }[metric]
    torch.testing.assert_close(scores(v, group, options), want)


@pytest.mark.parametrize(("family", "width"), [("query", 8), ("kv_group", 16)])
def test_fluctuation_of_heads_is_squared_and_averaged(family: str, width: int) -> None:
    v = views("llama")
    group = unit_groups(v, family)[0]
    moments = watched(v, group, Fluctuation()).moments(group.consumers[0].x)
    columns = weight(v.program, "model.layers.0.self_attn.o_proj.weight")
    channel = (moments.variance * columns.square().sum(0)).square()
    torch.testing.assert_close(scores(v, group, Fluctuation()), channel.reshape(-1, width).mean(1))


def test_fluctuation_ignores_how_scale_is_split() -> None:
    v = views("llama")
    factor = torch.linspace(0.3, 4.0, 56, dtype=torch.float64)
    heads = torch.linspace(0.5, 3.0, 16, dtype=torch.float64)
    other = Views(
        changed(
            v.program,
            model__layers__1__mlp__up_proj__weight=(factor, 0),
            model__layers__1__mlp__down_proj__weight=(1 / factor, 1),
            model__layers__1__self_attn__v_proj__weight=(heads, 0),
            model__layers__1__self_attn__o_proj__weight=(
                1 / heads.reshape(2, 1, 8).expand(2, 2, 8).reshape(-1),
                1,
            ),
        )
    )
    for family in ("query", "kv_group", "neuron"):
        ours, theirs = (scores(w, unit_groups(w, family)[1], Fluctuation()) for w in (v, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_magnitude_counts_producers_and_consumers() -> None:
    v = views("llama")
    layer = {
        name: weight(v.program, f"model.layers.2.{name}.weight")
        for name in (*(f"mlp.{side}_proj" for side in ("up", "gate", "down")), *(f"self_attn.{s}_proj" for s in "qkvo"))
    }
    want = (
        layer["mlp.up_proj"].square().sum(1)
        + layer["mlp.gate_proj"].square().sum(1)
        + layer["mlp.down_proj"].square().sum(0)
    ).sqrt()
    torch.testing.assert_close(scores(v, unit_groups(v, "neuron")[2], Magnitude()), want)
    query = layer["self_attn.q_proj"].square().sum(1) + layer["self_attn.o_proj"].square().sum(0)
    want = query.reshape(4, 8).sum(1).sqrt()
    torch.testing.assert_close(scores(v, unit_groups(v, "query")[2], Magnitude()), want)
    cached = (layer["self_attn.k_proj"].square() + layer["self_attn.v_proj"].square()).sum(1)
    want = (query.reshape(2, 16).sum(1) + cached.reshape(2, 8).sum(1)).sqrt()
    torch.testing.assert_close(scores(v, unit_groups(v, "kv_group")[2], Magnitude()), want)


def test_activation_is_minitrons() -> None:
    v = views("llama")
    group = unit_groups(v, "query")[0]
    each = watched(v, group, Activation()).moments(group.consumers[0].x).sample_l2
    torch.testing.assert_close(scores(v, group, Activation()), each.reshape(4, 8).square().sum(1).sqrt())
    hidden = unit_groups(v, "hidden")[0]
    statistics = watched(v, hidden, Activation())
    norms = [tap.node for tap in statistics]
    assert len(norms) == 2 * 3 + 1
    want = torch.stack([statistics.moments(node).sample_l2 for node in norms]).sum(0)
    torch.testing.assert_close(scores(v, hidden, Activation()), want)


def test_taylor_sums_the_features_that_go_together() -> None:
    v = views("llama")
    group = unit_groups(v, "query")[1]
    terms = watched(v, group, TaylorScore()).taylor(group.consumers[0].x).terms
    want = terms.reshape(6, 4, 8).sum(2).abs().mean(0)
    torch.testing.assert_close(scores(v, group, TaylorScore()), want)


@pytest.mark.parametrize("name", ["llama_mqa", "phi3"])
@pytest.mark.parametrize("options", [Magnitude(), Fluctuation(), Activation(), TaylorScore(), Order()])
def test_every_score_ranks_every_family(name: str, options: AnyScore) -> None:
    v = views(name)
    for family in FAMILIES:
        for group in unit_groups(v, family)[:1]:
            found = scores(v, group, options)
            assert found.shape == (group.units,)
            assert found.dtype == torch.float64
            assert len(found.unique()) > 1
            assert torch.equal(found, scores(v, group, options))


def test_zscore_is_taken_over_features() -> None:
    v = views("llama")
    group = unit_groups(v, "query")[0]
    statistics = watched(v, group, Fluctuation())
    columns = weight(v.program, "model.layers.0.self_attn.o_proj.weight")
    channel = (statistics.moments(group.consumers[0].x).variance * columns.square().sum(0)).square().numpy()
    want = ((channel - channel.mean()) / channel.std(ddof=1)).reshape(4, 8).mean(1)
    found = score(group, v, statistics, Fluctuation(), "zscore").numpy()
    np.testing.assert_allclose(found, want, rtol=1e-10)


def test_what_a_score_needs_is_said() -> None:
    v = views("llama")
    group = unit_groups(v, "neuron")[0]
    with pytest.raises(PlanError, match="score activation needs calibration text"):
        score(group, v, None, Activation())
    blind = dataclasses.replace(v.program, weights=dataclasses.replace(v.program.weights, source=None))
    with pytest.raises(PlanError, match="cannot be read") as caught:
        score(unit_groups(Views(blind), "neuron")[0], Views(blind), None, Magnitude())
    assert "score: order" in str(caught.value)
    nan = changed(v.program, model__layers__0__mlp__up_proj__weight=(torch.full((56,), float("nan")), 0))
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.up_proj\.weight' holds 1792 NaN"):
        score(unit_groups(Views(nan), "neuron")[0], Views(nan), None, Magnitude())


@pytest.mark.parametrize("options", [Fluctuation(), Activation(), TaylorScore()], ids=lambda one: one.kind)
def test_neurons_of_chosen_experts_are_scored_without_padding(options: AnyScore) -> None:
    """Each choice of a token is a row; those of padding do not count."""
    v = views("mixtral")
    group = next(group for group in unit_groups(v, "neuron") if group.consumers[0].layout == "choices")
    ids = tokens(2, 9)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    together = [{"input_ids": ids, "attention_mask": padding, "position_ids": positions}]
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, 4:]}]
    wanted = taps(group, v, options)
    one, two = (observe(v.program, wanted, batches, dtype=torch.float64, views=v) for batches in (together, alone))
    if not isinstance(options, TaylorScore):
        assert one.moments(group.consumers[0].x, "choices").count == 2 * (9 + 5)
    scores_of = [score(group, v, found, options) for found in (one, two)]
    torch.testing.assert_close(scores_of[0], scores_of[1], rtol=1e-6, atol=1e-9)
