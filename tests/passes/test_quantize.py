"""Quantisation: packed weights stand for the rounded ones, every bank is covered, widths for experts are the best ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt.diagnostics import BudgetError, PlanError
from graphopt.ir.program import Program
from graphopt.ops.quantised import encode, grid, pack, unpack
from graphopt.passes.weights.packing import Pack
from graphopt.passes.weights.quantize import Quantize
from graphopt.passkit import PassRegistry
from graphopt.select.allocate import best_widths
from graphopt.spec import parse_spec
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import given as inputs
from graphopt.testing.trial import trial
from graphopt.views import Views
from tests.tiny import program

BANKS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
HELD = ("surgery_equals_emulation", "nothing_left_behind", "cost_is_counted", "save_and_load_keep_bits")
MIXED = {"experts": {"widths": (1, 2, 3), "average": 2.5}, "group": 8}


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 9))
def test_packed_codes_unpack(bits: int, size: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape[-1] == -(-size * bits // 8)
    assert torch.equal(unpack(packed, bits, size), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_value_is_further_than_half_a_step(bits: int) -> None:
    values = torch.randn(5, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, low = grid(values, bits, 8)
    assert scale.shape == (5, 3)
    found = torch.ops.graphopt.dequantise(pack(encode(values, scale, low, bits, 8), bits), scale, low, bits, 8, 21)
    step = scale.repeat_interleave(8, -1)[:, :21]
    assert bool(((found - values).abs() <= step / 2 + 1e-12).all())
    # The least and the largest value of each group are points of its grid.
    assert torch.allclose(found[:, :8].amax(-1), values[:, :8].amax(-1))
    assert torch.allclose(found[:, 16:].amin(-1), values[:, 16:].amin(-1))


def test_one_bit_is_the_sign_and_the_mean_magnitude() -> None:
    values = torch.tensor([[1.0, -2.0, 3.0, -4.0, 6.0]])
    scale, low = grid(values, 1, 4)
    codes = encode(values, scale, low, 1, 4)
    found = torch.ops.graphopt.dequantise(pack(codes, 1), scale, low, 1, 4, 5)
    assert found.tolist() == [[2.5, -2.5, 2.5, -2.5, 6.0]]


@pytest.mark.parametrize("name", BANKS)
def test_every_bank_of_matrices_is_packed(name: str) -> None:
    config = Quantize(group=8)
    case = trial(config, program(name))
    for law in HELD:
        LAWS[law](config, case.program)
    banks = {w for w, weight in case.program.weights.weights.items() if len(weight.expr.shape) == 3}
    assert len(banks) == 2 * len(case.views.experts)
    assert banks <= {edit.candidate for edit in case.plan.edits}
    assert not [w for w, weight in case.after.weights.weights.items() if w in banks]
    routers = {bank.router.weight for bank in case.views.experts if bank.router is not None}
    assert routers <= set(case.after.weights)
    # Four bits and a scale and a lowest value in float32 for every 8 values or fewer.
    covered = case.plan.notes["covered"]
    saved = case.program.weights.bytes - case.after.weights.bytes
    assert saved >= covered * (4 - 0.5 - 2 * 4 / 4)
    assert case.after.weights.bytes < case.program.weights.bytes


@pytest.mark.parametrize("name", BANKS)
def test_banks_that_are_not_recognised_are_an_error(name: str) -> None:
    whole = program(name)
    for lost in (*Views(whole).labels.bank_linears, None):
        views = Views(whole)
        banks = views.labels.bank_linears
        # Each bank on its own, and all of them.
        for node in [lost] if lost is not None else list(banks):
            del banks[node]
        config = Quantize()
        context = trial(config, whole).context_of(views)
        with pytest.raises(PlanError, match="would stay as it is"):
            config.plan(context)
        assert Quantize(parts=("products",)).plan(context).edits


def test_no_bank_at_all_is_an_error() -> None:
    spec = "{graphopt: 1, verify: 'off', steps: [{use: quantize, parts: [experts]}]}"
    with pytest.raises(PlanError, match="quantize found nothing to change"):
        graphopt.compile(program("llama"), parse_spec(spec, registry=PassRegistry(), file="spec.yaml"))


def test_both_runs_of_a_contrast_are_packed() -> None:
    from graphopt.passes.experts.self_contrast import SelfContrast

    one = build(Shape(layers=2, heads=2, kv_heads=2, head_dim=4, hidden=8, neurons=6, experts=4, chosen=2))
    two = trial(SelfContrast(), one).after
    case = trial(Quantize(group=8), two)
    assert {edit.candidate for edit in case.plan.edits} == {
        edit.candidate for edit in trial(Quantize(group=8), one).plan.edits
    }
    LAWS["surgery_equals_emulation"](case.config, two)


def test_eight_bits_are_nearly_the_model() -> None:
    errors = []
    for bits in (8, 4, 2):
        case = trial(Quantize(bits=bits, group=8), program("mixtral"))
        given_ = inputs(case.program, {"B": 2, "S": 9}, 0)
        got, was = (p.module(torch.float64)(**given_)[0] for p in (case.after, case.program))
        errors.append(float((got - was).norm() / was.norm()))
    assert errors[0] < 0.02
    assert errors == sorted(errors)


@given(st.integers(1, 5), st.integers(0, 99), st.floats(1.0, 3.2), st.sampled_from([(), (3,), (2, 3)]))
def test_widths_are_the_best_of_all(units: int, seed: int, average: float, required: tuple[int, ...]) -> None:
    costs = np.random.default_rng(seed).random((units, 3))
    widths, budget = (1, 2, 3), int(average * units)
    fits = [
        choice
        for choice in itertools.product(range(3), repeat=units)
        if sum(widths[i] for i in choice) <= budget and {widths[i] for i in choice} >= set(required)
    ]
    if not fits:
        with pytest.raises(BudgetError, match="do not fit"):
            best_widths(costs, widths, budget, required)
        return
    found = best_widths(costs, widths, budget, required)
    total = sum(costs[i, widths.index(bits)] for i, bits in enumerate(found))
    least = min(sum(costs[i, column] for i, column in enumerate(choice)) for choice in fits)
    assert total == pytest.approx(least, abs=1e-12)
    assert sum(found) <= budget
    assert set(found) >= set(required)
    if average < 3:
        more = best_widths(costs, widths, budget + 1, required)
        assert sum(costs[i, widths.index(bits)] for i, bits in enumerate(more)) <= total + 1e-12


def _alone(whole: Program, bank: Any, expert: int, bits: int) -> Program:
    """The program with one expert alone rounded, its weights otherwise as they are."""
    from graphopt.ir.expressions import Cat, Take
    from graphopt.ir.packed import Packed
    from graphopt.ir.rewriter import Rewriter

    rewriter = Rewriter(whole)
    for linear in {(bank.gate or bank.up).weight: bank.up, bank.down.weight: bank.down}.values():

        def one(expr: Any, turned: bool = linear.in_axis == 1) -> Any:
            each = [Take(expr, 0, (i,)) for i in range(bank.experts)]
            each[expert] = Packed(each[expert], "value", bits, 8, turned)
            return Cat(tuple(each), 0)

        rewriter.set_weight(linear.weight, one)
    rewriter.add_output("made", rewriter.node(views_output(whole, bank)))
    return rewriter.finish()


def views_output(whole: Program, bank: Any) -> Any:
    """The node that the experts of the first layer add to the stream."""
    return Views(whole).blocks[0].exit


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_experts_error_is_that_of_the_layer_when_it_alone_is_rounded(name: str) -> None:
    config = Quantize.model_validate(MIXED)
    case = trial(config, program(name))
    bank = case.views.experts[0]
    errors = torch.tensor(case.plan.notes["experts"][bank.path]["errors"])
    from graphopt.compiler.verify import random_inputs
    from graphopt.testing.trial import CALIBRATION

    # Padded rows do not count, so the text here has none.
    for expert, bits in ((0, 1), (bank.experts - 1, 3)):
        total = 0.0
        for i, sizes in enumerate(CALIBRATION):
            given_ = random_inputs(case.program, sizes, i)
            mask = given_.get("attention_mask", torch.ones(sizes["B"], sizes["S"])).bool()
            whole = _alone(case.program, bank, expert, bits).module(torch.float64)(**given_)[-1]
            from graphopt.ir.rewriter import Rewriter

            plain = Rewriter(case.program)
            plain.add_output("made", plain.node(case.views.blocks[0].exit))
            was = plain.finish().module(torch.float64)(**given_)[-1]
            total += float((whole - was)[mask].square().sum())
        column = MIXED["experts"]["widths"].index(bits)  # type: ignore[index]
        assert float(errors[expert, column]) == pytest.approx(total**0.5, rel=1e-3)


@pytest.mark.parametrize("name", BANKS)
def test_experts_of_several_widths_share_a_bank(name: str) -> None:
    config = Quantize.model_validate(MIXED)
    case = trial(config, program(name))
    for law in HELD:
        LAWS[law](config, case.program)
    mixed = [edit for edit in case.plan.edits if isinstance(edit, Pack) and edit.bank]
    assert len(mixed) == 2 * len(case.views.experts)
    for edit in mixed:
        assert not isinstance(edit.bits, int)
        assert sum(edit.bits) <= 2.5 * len(edit.bits)
        assert {2, 3} <= set(edit.bits)


def test_routers_embeddings_and_what_lies_outside_are_left_with_a_reason() -> None:
    plan = trial(
        Quantize(), build(Shape(layers=2, heads=2, kv_heads=2, head_dim=4, hidden=8, neurons=8, tied=True))
    ).plan
    reasons = {decline.candidate: decline.reason for decline in plan.declines}
    assert reasons["embedding.weight"] in ("it lies outside the layers", "it is tied to a table that is looked up")
    assert len(plan.edits) == 2 * 6
