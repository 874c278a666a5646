"""Experts of stock models: their banks are recognised, and pruned experts are what masked ones are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.artifact import save
from graphopt.diagnostics import BudgetError, PlanError
from graphopt.passes.width.prune_experts import PruneExperts
from graphopt.testing.laws import LAWS
from graphopt.testing.trial import given, trial
from graphopt.views import Views, unit_groups
from tests.tiny import program, tokens

# Banks, experts, groups that the router chooses first, shared feed-forwards, neurons.
WANTED = {
    "mixtral": (2, 4, 1, 0, 24),
    "qwen3_moe": (2, 6, 1, 0, 12),
    "qwen2_moe": (2, 6, 1, 1, 12),
    "deepseek_v3": (1, 8, 2, 1, 12),
    "gpt_oss": (2, 4, 1, 0, 24),
}
HELD = (
    "surgery_equals_emulation",
    "nothing_left_behind",
    "runs_at_other_shapes",
    "cost_is_counted",
    "plan_is_complete",
)


@pytest.mark.parametrize("name", WANTED)
def test_banks_of_stock_models_are_recognised(name: str) -> None:
    views = Views(program(name))
    banks, experts, rows, shared, neurons = WANTED[name]
    assert len(views.experts) == banks
    assert not [one for one in views.unseen if not one.what.startswith("attention")]
    for bank in views.experts:
        assert (bank.experts, bank.top_k, bank.neurons, len(bank.shared)) == (experts, 2, neurons, shared)
        assert bank.router is not None
        assert bank.index is not None
        assert bank.share is not None
        assert bank.share.meta["val"].shape == bank.index.meta["val"].shape
        # Every bank of matrices is one of the view's.
        held = {bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight}
        path = bank.up.weight.rpartition(".")[0]
        named = {w for w in views.program.weights if w.startswith(f"{path}.") and views.program.weight_nodes[w]}
        assert {w for w in named if len(views.program.weights[w].expr.shape) == 3} == held
    assert [(group.rows, group.units) for group in unit_groups(views, "expert")] == [(rows, experts)] * banks


@pytest.mark.parametrize("score", ["magnitude", "routing"])
@pytest.mark.parametrize("name", WANTED)
def test_pruned_experts_are_masked_experts(name: str, score: str) -> None:
    keep = "experts - 2" if name == "deepseek_v3" else "experts - 1"
    config = PruneExperts.model_validate({"keep": keep, "score": {"kind": score}})
    case = trial(config, program(name))
    assert len(case.plan.edits) == WANTED[name][0]
    for law in HELD:
        LAWS[law](config, case.program)
    assert case.after.weights.parameters < case.program.weights.parameters
    given_ = given(case.program, {"B": 2, "S": 9}, 0)
    got, was = (p.module(torch.float64)(**given_)[0] for p in (case.after, case.program))
    assert float((got - was).abs().max()) > 1e-3
    left = [bank.experts for bank in Views(case.after).experts]
    assert left == [WANTED[name][1] - (2 if name == "deepseek_v3" else 1)] * WANTED[name][0]


def test_the_least_used_experts_go() -> None:
    whole = program("mixtral")
    views = Views(whole)
    text = tokens(4, 16)
    counted = []
    for bank in views.experts:
        holder: dict[str, torch.Tensor] = {}
        _listen(whole, bank.index.name, bank.share.name, text, holder)  # type: ignore[union-attr]
        mass = torch.zeros(bank.experts, dtype=torch.float64)
        mass.index_add_(0, holder["index"].reshape(-1), holder["share"].reshape(-1))
        counted.append(mass)
    from graphopt.observe import observe
    from graphopt.passkit import Context

    config = PruneExperts.model_validate({"keep": "experts - 2", "score": {"kind": "routing"}})
    plain = Context(views, (0, 1))
    found = observe(whole, config.observe(plain), [{"input_ids": part} for part in text.split(2)], dtype=torch.float64)
    plan = config.plan(Context(views, (0, 1), found))
    for edit, mass in zip(plan.edits, counted, strict=True):
        assert list(edit.keep) == sorted(mass.argsort(descending=True)[:2].tolist())  # type: ignore[attr-defined]


def _listen(whole: Any, index: str, share: str, text: torch.Tensor, into: dict[str, torch.Tensor]) -> None:
    from graphopt.ir.rewriter import Rewriter

    rewriter = Rewriter(whole)
    rewriter.add_output("index", rewriter.node(index))
    rewriter.add_output("share", rewriter.node(share))
    made = rewriter.finish()
    into.update(zip(made.entry.outputs, made.module(torch.float64)(input_ids=text), strict=True))


def test_as_many_stay_as_are_chosen() -> None:
    case = PruneExperts.model_validate({"keep": 1, "allocate": {"kind": "uniform", "tolerance": "0%"}})
    with pytest.raises(BudgetError, match="cannot be kept"):
        case.plan(trial(case, program("mixtral")).context)
    listed = PruneExperts.model_validate({"allocate": {"kind": "explicit", "keep": {0: (1,)}}})
    with pytest.raises(PlanError, match="2 are chosen for each token"):
        listed.plan(trial(listed, program("mixtral")).context)


def test_groups_keep_equally_many() -> None:
    listed = PruneExperts.model_validate({"allocate": {"kind": "explicit", "remove": {1: (0, 1)}}})
    with pytest.raises(PlanError, match="would keep"):
        listed.plan(trial(listed, program("deepseek_v3")).context)


def test_fewer_experts_load_in_stock_transformers(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    case = trial(PruneExperts.model_validate({"keep": "experts - 1"}), program("mixtral"))
    save(case.after, tmp_path, format="transformers")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_local_experts == 3
    text = tokens(2, 7)
    with torch.no_grad():
        want = case.after.module()(input_ids=text)[0]
        assert float((model(text).logits - want).abs().max()) < 1e-4 * float(want.abs().max())
