"""Allocation: budgets are met or refused, rows stay equal, ties keep the lower index."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.diagnostics import BudgetError, PlanError
from graphopt.select.allocate import Candidate, check_units, explicit, pooled, uniform

PERCENT = Fraction(1, 100)


def view(
    scores: Any, *, rows: int = 1, cost: int = 1, keep: str = "1/2", round_to: int = 1, name: str = "v"
) -> Candidate:
    values = np.asarray(scores, dtype=np.float64)
    return Candidate(name, values, rows, len(values) // rows, cost, Fraction(keep) * len(values), round_to)


def kept(found: list[int], views: list[Candidate]) -> int:
    return sum(v.cost * v.rows * count for v, count in zip(views, found, strict=True))


def test_the_best_stay_in_their_order() -> None:
    assert view([3, 9, 1, 7]).keep(2) == (1, 3)


def test_ties_keep_the_lower_index() -> None:
    assert view([1.0] * 6).keep(3) == (0, 1, 2)
    twins = [view([1.0] * 4, name="a"), view([1.0] * 4, name="b")]
    assert pooled(twins, PERCENT, 1, "units") == [3, 1]


def test_rows_keep_equally_many() -> None:
    grouped = view([5, 1, 2, 6, 3, 4, 8, 7], rows=2)
    assert grouped.keep(2) == ((0, 3), (2, 3))
    assert uniform([grouped], PERCENT) == [2]


def test_uniform_meets_each_view_or_says_what_it_can() -> None:
    assert uniform([view(range(8), keep="3/4"), view(range(172), keep="7/8")], PERCENT) == [6, 151]
    with pytest.raises(BudgetError, match=r"v: 6\.4 of 8 units cannot be kept within 1%") as caught:
        uniform([view(range(8), keep="4/5")], PERCENT)
    assert "75% (6) and 87.5% (7)" in str(caught.value)
    assert uniform([view(range(8), keep="4/5")], Fraction(1, 10)) == [6]


def test_at_least_one_unit_stays() -> None:
    with pytest.raises(BudgetError, match=r"nearest that can be kept: 25% \(1\)"):
        uniform([view(range(4), keep="0")], PERCENT)


def test_rounding_is_to_the_nearest_multiple() -> None:
    assert uniform([view(range(512), keep="77/100", round_to=32)], Fraction(3, 100)) == [384]
    with pytest.raises(BudgetError, match=r"75% \(384\) and 81\.25% \(416\)"):
        uniform([view(range(512), keep="77/100", round_to=32)], PERCENT)
    with pytest.raises(BudgetError, match="no number of units up to 24 can be divided by 32"):
        uniform([view(range(24), round_to=32)], PERCENT)
    grouped = view(range(24), rows=4, round_to=8)
    assert grouped.rungs() == [2, 4, 6]


def test_the_pool_spends_on_the_best() -> None:
    views = [view([9, 8, 7, 1]), view([6, 2, 3, 0])]
    assert pooled(views, PERCENT, 1, "units") == [3, 1]


def test_a_large_unit_does_not_spoil_the_budget() -> None:
    heads = view([5, 4, 3, 2], cost=100, keep="3/5", name="heads")
    neurons = view(np.linspace(4.5, 0, 200), cost=1, keep="3/5", name="neurons")
    found = pooled([heads, neurons], PERCENT, 1, "parameters")
    assert abs(kept(found, [heads, neurons]) - 360) <= 6


def test_a_pool_of_large_units_is_refused_with_the_nearest() -> None:
    views = [view([3, 2, 1, 0], cost=100, keep="3/5"), view([7, 6, 5, 4], cost=100, keep="3/5")]
    with pytest.raises(BudgetError, match="the pool: 480 of 800 parameters") as caught:
        pooled(views, PERCENT, 1, "parameters")
    assert "50% (400) and 62.5% (500)" in str(caught.value)


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 50), st.integers(0, 10**6)),
        min_size=1,
        max_size=5,
    ),
    st.fractions(0, 1),
    st.integers(1, 3),
)
def test_a_pool_is_within_its_tolerance_or_refused(
    shapes: list[tuple[int, int, int, int]], share: Fraction, minimum: int
) -> None:
    views = []
    for rows, per_row, cost, seed in shapes:
        values = np.random.default_rng(seed).normal(size=rows * per_row)
        views.append(Candidate("v", values, rows, per_row, cost, share * rows * per_row))
    total = sum(v.cost * v.units for v in views)
    tolerance = Fraction(1, 20)
    try:
        found = pooled(views, tolerance, minimum, "units")
    except BudgetError:
        return
    assert abs(kept(found, views) - share * total) <= tolerance * total
    assert found == pooled(views, tolerance, minimum, "units")
    for v, count in zip(views, found, strict=True):
        assert v.rows * count >= min(minimum, v.units)


@given(st.integers(0, 10**6), st.integers(2, 40))
def test_unit_costs_always_reach_the_nearest_count(seed: int, units: int) -> None:
    values = np.random.default_rng(seed).normal(size=2 * units)
    views = [view(values[:units]), view(values[units:])]
    found = pooled(views, Fraction(1, 2 * units), 1, "units")
    chosen = {float(x) for v, n in zip(views, found, strict=True) for x in v.scores[list(v.keep(n))]}  # type: ignore[arg-type]
    assert sum(found) == units
    best = set(np.sort(values)[::-1][:units].tolist())
    if all(best & set(v.scores.tolist()) for v in views):
        assert chosen == best


def test_explicit_units_are_checked() -> None:
    assert explicit(view(range(6)), (4, 1)) == (1, 4)
    assert explicit(view(range(6), rows=2), (0, 4)) == ((0,), (1,))
    with pytest.raises(PlanError, match="v has no unit 6"):
        explicit(view(range(6)), (6,))
    with pytest.raises(PlanError, match="unit 1 of v is listed twice"):
        check_units(view(range(6)), (1, 2, 1))
    with pytest.raises(PlanError, match="would keep no unit"):
        explicit(view(range(6)), ())
    with pytest.raises(PlanError, match=r"would keep \[2, 1\] query heads of its 2 KV heads"):
        explicit(view(range(6), rows=2), (0, 1, 3))
