"""What the width passes decide: every view is answered, budgets are met or refused, mistakes are named."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

from graphopt.diagnostics import BudgetError, PlanError, SpecError
from graphopt.passes.width.base import WidthPass
from graphopt.passes.width.prune_heads import PruneHeads
from graphopt.passes.width.prune_hidden import PruneHidden
from graphopt.passes.width.prune_neurons import PruneNeurons
from graphopt.passes.width.prune_units import PruneUnits
from graphopt.passkit import Context, PassRegistry, Plan
from graphopt.passkit.edits import Cut, apply_edits
from graphopt.select.options import Amount, Explicit, Global, Magnitude, Order, PerLayer, Uniform
from graphopt.select.score import score
from graphopt.spec import Percent, ScalarError, parse_spec
from graphopt.views import Views, unit_groups
from tests.tiny import program


@cache
def views(name: str) -> Views:
    return Views(program(name))


def planned(config: WidthPass, name: str = "llama", layers: tuple[int, ...] = (0, 1, 2), paths: Any = ()) -> Plan:
    return config.plan(Context(views(name), layers, paths=paths))


def spec(step: str) -> WidthPass:
    lines = "\n".join(f"    {line}" for line in step.strip().splitlines()).lstrip()
    loaded = parse_spec(f"graphopt: 1\nmodel: ./m\nsteps:\n  - {lines}\n", [], registry=PassRegistry())
    return loaded.steps[0].config  # type: ignore[return-value]


def refused(step: str) -> str:
    with pytest.raises(SpecError) as caught:
        spec(step)
    return str(caught.value)


def keep(value: str) -> Amount:
    return Amount.parse(value)


def counts(plan: Plan) -> list[tuple[int, int]]:
    return [edit.count() for edit in plan.edits if isinstance(edit, Cut)]


def test_every_view_is_answered() -> None:
    plan = planned(PruneNeurons(keep=keep("50%")), layers=(1,))
    assert [edit.candidate for edit in plan.edits] == ["model.layers.1.mlp:neuron"]
    assert {decline.candidate: decline.reason for decline in plan.declines} == {
        "model.layers.0.mlp:neuron": "outside `where`",
        "model.layers.2.mlp:neuron": "outside `where`",
    }
    plan = planned(PruneUnits(keep=keep("100%"), score=Magnitude()))
    assert not plan.edits
    assert sorted(decline.reason for decline in plan.declines) == ["keeps all 2"] * 3 + ["keeps all 56"] * 3


def test_paths_select_views_and_blocks() -> None:
    config = PruneNeurons(keep=keep("50%"))
    for path in ("model.layers.2", "model.layers.2.mlp"):
        assert [edit.view for edit in planned(config, paths=(path,)).edits] == ["model.layers.2.mlp"]  # type: ignore[attr-defined]


def test_numbers_may_be_expressions() -> None:
    assert counts(planned(PruneNeurons(keep=keep("round_to(neurons / 2, 16)")))) == [(56, 32)] * 3
    assert counts(planned(PruneHeads(keep=keep("heads - kv_heads")))) == [(4, 2)] * 3
    assert counts(planned(PruneHeads(unit="kv_group", keep=keep("kv_heads / 2")))) == [(2, 1)] * 3
    assert counts(planned(PruneHidden(keep=keep("hidden - 8 * layers / 3")))) == [(32, 24)]
    with pytest.raises(ScalarError, match=r"'neurons / 3' is .*, not an integer"):
        planned(PruneNeurons(keep=keep("neurons / 3")))
    with pytest.raises(ScalarError, match="'57' is 57, but a number from 1 to 56 can stay"):
        planned(PruneNeurons(keep=keep("57")))


def test_one_amount_a_layer() -> None:
    config = PruneNeurons(allocate=PerLayer(keep=(keep("25%"), keep("7"))))
    assert counts(planned(config, layers=(0, 2))) == [(56, 14), (56, 7)]
    with pytest.raises(PlanError, match="allocate lists 2 layers, but the step is about 3"):
        planned(config)


def test_units_may_be_listed() -> None:
    stay = planned(PruneHeads(allocate=Explicit(keep={0: (3, 0), 2: (0, 1, 2, 3)})))
    assert [(edit.view, edit.keep) for edit in stay.edits] == [("model.layers.0.self_attn", ((0,), (1,)))]  # type: ignore[attr-defined]
    assert [decline.reason for decline in stay.declines] == ["not listed", "keeps all 4"]
    go = planned(PruneHeads(allocate=Explicit(remove={0: (1, 2)})))
    assert go.edits[0].to_json() == stay.edits[0].to_json()
    with pytest.raises(PlanError, match="layer 7, which this step cannot cut"):
        planned(PruneHeads(allocate=Explicit(remove={7: (1,)})))
    with pytest.raises(PlanError, match=r"would keep \[2, 1\] query heads of its 2 KV heads"):
        planned(PruneHeads(allocate=Explicit(remove={0: (3,)})))
    with pytest.raises(PlanError, match="has no unit 4"):
        planned(PruneHeads(allocate=Explicit(remove={0: (4,)})))


def test_data_free_order_keeps_the_first() -> None:
    plan = planned(PruneNeurons(keep=keep("25%"), score=Order()))
    assert [edit.keep for edit in plan.edits] == [tuple(range(14))] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("of", ["parameters", "flops", "kv_bytes"])
def test_a_global_budget_counts_what_it_says(of: Any) -> None:
    config = PruneHeads(unit="kv_group", keep=keep("50%"), allocate=Global(), of=of)
    plan = planned(config, "llama_mha")
    budget = plan.notes["budget"]
    each = {"parameters": 4 * 8 * 32, "flops": 2 * 4 * 8 * 32, "kv_bytes": 2 * 8 * 4}[of]
    assert budget == {"of": of, "target": 6.0 * each, "kept": 6 * each, "total": 12 * each}
    before, after = (v.weights.parameters for v in (program("llama_mha"), applied(plan, "llama_mha")))
    assert before - after == 6 * 4 * 8 * 32


def applied(plan: Plan, name: str) -> Any:
    return apply_edits(program(name), views(name), plan.edits)


def test_a_pool_meets_its_parameters_exactly() -> None:
    config = PruneUnits(keep=keep("70%"), score=Magnitude(), allocate=Global(tolerance=Percent.parse("2%")))
    plan = planned(config, "llama_mha")
    budget = plan.notes["budget"]
    assert abs(budget["kept"] - 0.7 * budget["total"]) <= 0.02 * budget["total"]
    before, after = (v.weights.parameters for v in (program("llama_mha"), applied(plan, "llama_mha")))
    assert before - after == budget["total"] - budget["kept"]


def test_a_pool_is_flaps() -> None:
    """AL-AM of the published code: standardised scores, one sorted list, cut where the cost is nearest."""
    v = views("llama_mha")
    config = PruneUnits(keep=keep("60%"), score=Magnitude(), allocate=Global(tolerance=Percent.parse("10%")))
    plan = config.plan(Context(v, (0, 1, 2)))
    groups = [*unit_groups(v, "kv_group"), *unit_groups(v, "neuron")]
    pool, cost, owner = [], [], []
    for number, group in enumerate(groups):
        values = score(group, v, None, Magnitude()).numpy()
        values = (values - values.mean()) / values.std(ddof=1)
        pool.extend(values)
        cost.extend([512 / 3 * 8 / 128 if group.family == "kv_group" else 1.0] * len(values))
        owner.extend([number] * len(values))
    order = np.argsort(-np.array(pool), kind="stable")
    spent = np.cumsum(np.array(cost)[order])
    threshold = pool[order[np.argmin(np.abs(spent - sum(cost) * 0.6))]]
    want = [sum(o == n and p >= threshold for o, p in zip(owner, pool, strict=True)) for n in range(len(groups))]
    kept = {edit.candidate: edit.count()[1] for edit in plan.edits if isinstance(edit, Cut)}
    found = [kept.get(f"{group.view}:{group.family}", group.units) for group in groups]
    assert found == want


def test_budgets_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"model\.layers\.0\.self_attn:query: 3\.2 of 4 units") as caught:
        planned(PruneHeads(keep=keep("80%")), "llama_mha")
    assert "75% (3) and 100% (4)" in str(caught.value)
    with pytest.raises(BudgetError, match="nearest that can be kept: 50"):
        planned(PruneHeads(keep=keep("75%")), "llama")
    with pytest.raises(BudgetError, match="no number of units up to 56 can be divided by 64"):
        planned(PruneNeurons(keep=keep("50%"), round=64))
    wide = Uniform(tolerance=Percent.parse("10%"))
    assert counts(planned(PruneHeads(keep=keep("80%"), allocate=wide), "llama_mha")) == [(4, 3)] * 3


def test_query_heads_hold_no_cache() -> None:
    with pytest.raises(PlanError, match="these units hold no kv_bytes") as caught:
        planned(PruneHeads(keep=keep("50%"), allocate=Global(), of="kv_bytes"), "llama")
    assert "unit: kv_group" in str(caught.value)


def test_the_stream_has_one_width() -> None:
    with pytest.raises(PlanError, match="leave `where` out"):
        planned(PruneHidden(keep=keep("50%")), layers=(0, 1))


def test_compensation_needs_text() -> None:
    with pytest.raises(PlanError, match="mean_bias needs calibration text"):
        planned(PruneNeurons(keep=keep("50%"), compensate="mean_bias"))


def test_a_spec_says_what_a_step_does() -> None:
    config = spec(
        """
use: prune_units
units: [query, neuron]
keep: 80%
score: {kind: fluctuation, metric: ifv}
allocate: {kind: global, minimum: 2, tolerance: 2%}
compensate: mean_bias
"""
    )
    assert isinstance(config, PruneUnits)
    assert config.allocate == Global(minimum=2, tolerance=Percent.parse("2%"))
    listed = spec('use: prune_heads\nallocate: {kind: explicit, remove: {"1": [0, 3]}}')
    for each in (config, listed, spec("use: prune_hidden\nkeep: 87.5%\nscore: activation\nround: 8")):
        assert (
            type(each).model_validate_json(json.dumps({k: v for k, v in each.to_yaml().items() if k != "use"})) == each
        )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("use: prune_heads", "keep is missing"),
        ("use: prune_heads\nkeep: 0.75", "did you mean 75%?"),
        ("use: prune_heads\nkeep: 175%", "175% is more than 100%"),
        ("use: prune_neurons\nkeep: neuron / 2", "did you mean 'neurons'"),
        ("use: prune_heads\nkeep: 50%\nscore: fluctuatoin", "fluctuation"),
        ("use: prune_heads\nkeep: 50%\nscore: {kind: fluctuation, metric: wif}", "wifv, wifn, ifv"),
        ("use: prune_heads\nkeep: 50%\nallocate: {kind: explicit, keep: {}}", "both say what stays"),
        ("use: prune_heads\nallocate: explicit", "say either keep or remove"),
        ("use: prune_units\nkeep: 50%\nunits: [query, kv_group]", "overlap"),
        ("use: prune_units\nkeep: 3", "no percentage of the pool"),
        ("use: prune_hidden\nkeep: 50%\ncompensate: mean_bias", "compensate"),
        ("use: prune_neurons\nkeep: 50%\nround: 0", "round"),
    ],
)
def test_mistakes_in_a_spec_are_named(step: str, message: str) -> None:
    found = refused(step)
    assert message in found
    assert "<text>:" in found


def test_options_need_no_torch() -> None:
    code = (
        "import sys; from graphopt.passkit import PassRegistry; r = PassRegistry();"
        "[r.get(n) for n in ('prune_heads', 'prune_hidden', 'prune_neurons', 'prune_units')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
