"""Allocation: from scores and a budget to the units that stay. Pure functions; ties keep the lower index.

A view's units come in rows (query heads of one KV head) of which equally many stay, so a view is a ladder: rung k keeps
the k best units of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from graphopt.diagnostics import BudgetError, PlanError


@dataclass(frozen=True, eq=False)
class Candidate:
    """One view to allocate to: `scores` `[rows * per_row]`, the cost of one unit, and how many units are wanted.

    `round_to` divides the number of units that may stay, `least` is how many of each row must.
    """

    name: str
    scores: npt.NDArray[np.float64]
    rows: int
    per_row: int
    cost: int
    target: Fraction
    round_to: int = 1
    least: int = 1

    @property
    def units(self) -> int:
        """Units in all rows."""
        return self.rows * self.per_row

    def ranked(self) -> npt.NDArray[np.int64]:
        """Unit indices `[rows, per_row]` within each row, best first."""
        table = self.scores.reshape(self.rows, self.per_row)
        return np.argsort(-table, axis=1, kind="stable")

    def rungs(self, minimum: int = 1) -> list[int]:
        """Numbers a row may keep, ascending: whole rounds, at least `minimum` units in all rows.

        Raises BudgetError when there is none.
        """
        found = [
            count
            for count in range(min(self.least, self.per_row), self.per_row + 1)
            if (self.rows * count) % self.round_to == 0 and self.rows * count >= min(minimum, self.units)
        ]
        if not found:
            raise BudgetError.of(
                "no_round_number",
                f"{self.name}: no number of units up to {self.units} can be divided by {self.round_to}"
                + (f" and taken equally from {self.rows} rows" if self.rows > 1 else ""),
                help=(f"choose a divisor of {self.units} for round",),
            )
        return found

    def keep(self, count: int) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        """The `count` best of each row, ascending; a table when there are several rows."""
        chosen = np.sort(self.ranked()[:, :count], axis=1)
        table = tuple(tuple(int(i) for i in row) for row in chosen)
        return table if self.rows > 1 else table[0]


@dataclass(frozen=True)
class Budget:
    """What was asked and what was met, in the unit of account."""

    of: str
    target: Fraction
    kept: int
    total: int

    def to_json(self) -> dict[str, str | int | float]:
        """Plain data for the trail."""
        return {"of": self.of, "target": float(self.target), "kept": self.kept, "total": self.total}


def uniform(candidates: Sequence[Candidate], tolerance: Fraction) -> list[int]:
    """For each view the number a row keeps: the rung nearest to the view's own target, the higher one of two.

    Raises BudgetError, with the nearest rungs, for a view whose target cannot be met within `tolerance` of its units.
    """
    chosen = []
    for view in candidates:
        rungs = view.rungs()
        best = min(rungs, key=lambda count: (abs(view.rows * count - view.target), -count))
        if abs(view.rows * best - view.target) > tolerance * view.units:
            below = [view.rows * count for count in rungs if view.rows * count < view.target]
            above = [view.rows * count for count in rungs if view.rows * count > view.target]
            raise _missed(view.name, "units", view.target, view.units, tolerance, below[-1:] + above[:1])
        chosen.append(best)
    return chosen


def pooled(candidates: Sequence[Candidate], tolerance: Fraction, minimum: int, of: str) -> list[int]:
    """For each view the number a row keeps when all compete: the best-scored rungs whose cost is nearest to the budget.

    The budget is the sum of the views' targets at their costs. Views first get `minimum` units; then rungs are taken by
    score, as FLAP's AL-AM does (arXiv 2312.11983), up to the prefix nearest to the budget. Where that misses the
    tolerance because one unit is large, smaller ones further down fill the rest. Raises BudgetError with the nearest
    totals when the budget cannot be met within `tolerance` of the pool.
    """
    total = sum(view.cost * view.units for view in candidates)
    target = sum((view.cost * view.target for view in candidates), Fraction(0))
    ladders = [view.rungs(minimum) for view in candidates]
    scores, costs, owner = _steps(candidates, ladders)
    spent = sum(view.cost * view.rows * ladder[0] for view, ladder in zip(candidates, ladders, strict=True))
    order = np.argsort(-scores, kind="stable")
    prefix = spent + np.concatenate([[0], np.cumsum(costs[order])])
    allowed = tolerance * total
    best = min(range(len(prefix)), key=lambda i: (abs(int(prefix[i]) - target), -i))
    rung = [0] * len(candidates)
    if abs(int(prefix[best]) - target) <= allowed:
        for step in order[:best]:
            rung[owner[step]] += 1
        return [ladder[i] for ladder, i in zip(ladders, rung, strict=True)]
    kept, blocked = spent, set()
    for step in order:
        view, cost = int(owner[step]), int(costs[step])
        if view in blocked or kept + cost > target + allowed:
            blocked.add(view)
            continue
        rung[view] += 1
        kept += cost
    if abs(kept - target) > allowed:
        above = [int(value) for value in prefix if value > target]
        raise _missed("the pool", of, target, total, tolerance, sorted({kept, *above[:1]}))
    return [ladder[i] for ladder, i in zip(ladders, rung, strict=True)]


def _steps(
    candidates: Sequence[Candidate], ladders: Sequence[list[int]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every step from a rung to the next: mean score of the units it adds, their cost, the view's position."""
    scores: list[float] = []
    costs: list[int] = []
    owner: list[int] = []
    for position, (view, ladder) in enumerate(zip(candidates, ladders, strict=True)):
        table = view.scores.reshape(view.rows, view.per_row)
        best = np.take_along_axis(table, view.ranked(), axis=1).mean(0)
        sums = np.concatenate([[0.0], np.cumsum(best)])
        for low, high in pairwise(ladder):
            single = high == low + 1
            scores.append(float(best[low]) if single else float(sums[high] - sums[low]) / (high - low))
            costs.append(view.cost * view.rows * (high - low))
            owner.append(position)
    return np.array(scores), np.array(costs, dtype=np.int64), np.array(owner, dtype=np.int64)


def best_widths(
    costs: npt.NDArray[np.float64], widths: Sequence[int], budget: int, required: Sequence[int] = ()
) -> tuple[int, ...]:
    """For each row of `costs` `[units, widths]` the width that makes the sum least, with at most `budget` bits in all.

    Each width in `required` is given to one unit at least (MC-MoE, arXiv 2410.06270). Exact: a dynamic programme over the
    bits spent and the required widths met. Raises BudgetError when no choice fits.
    """
    units, needed = len(costs), {width: 1 << i for i, width in enumerate(dict.fromkeys(required))}
    full = (1 << len(needed)) - 1
    best = np.full((units + 1, budget + 1, full + 1), np.inf)
    taken = np.full((units, budget + 1, full + 1), -1)
    before = np.zeros((units, budget + 1, full + 1), dtype=np.int64)
    best[0, 0, 0] = 0.0
    for unit in range(units):
        for column, width in enumerate(widths):
            for met in range(full + 1):
                now = met | needed.get(width, 0)
                if width > budget:
                    continue
                reached = best[unit, : budget + 1 - width, met] + costs[unit, column]
                better = reached < best[unit + 1, width:, now]
                best[unit + 1, width:, now][better] = reached[better]
                taken[unit, width:, now][better] = column
                before[unit, width:, now][better] = met
    spent = int(np.argmin(best[units, :, full]))
    if not np.isfinite(best[units, spent, full]):
        raise BudgetError.of(
            "budget_missed",
            f"{units} units of {sorted(widths)} bits, {sorted(needed)} among them, do not fit in {budget} bits",
            help=("allow more bits on average, or require fewer widths",),
        )
    met, chosen = full, []
    for unit in reversed(range(units)):
        column = int(taken[unit, spent, met])
        met = int(before[unit, spent, met])
        spent -= widths[column]
        chosen.append(widths[column])
    return tuple(reversed(chosen))


def check_units(view: Candidate, units: Sequence[int]) -> None:
    """Raise PlanError for a unit that the view does not have or that is listed twice."""
    wrong = sorted(i for i in set(units) if not 0 <= i < view.units)
    if wrong:
        raise PlanError.of(
            "no_such_unit", f"{view.name} has no unit {wrong[0]}", notes=(f"units are 0..{view.units - 1}",)
        )
    if len(set(units)) != len(units):
        twice = next(i for i in units if list(units).count(i) > 1)
        raise PlanError.of("unit_twice", f"unit {twice} of {view.name} is listed twice")


def explicit(view: Candidate, keep: Sequence[int]) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The given units of a view, ascending; raises PlanError when none or unequally many of the rows would stay."""
    check_units(view, keep)
    if not keep:
        raise PlanError.of(
            "nothing_left", f"{view.name} would keep no unit", help=("leave one, or use skip_layers to drop the part",)
        )
    rows: list[list[int]] = [[] for _ in range(view.rows)]
    for i in sorted(keep):
        rows[i // view.per_row].append(i % view.per_row)
    what, rest = ("units", "groups") if view.name.endswith(":expert") else ("query heads", "KV heads")
    if len({len(row) for row in rows}) > 1:
        raise PlanError.of(
            "unequal_rows",
            f"{view.name} would keep {[len(row) for row in rows]} {what} of its {view.rows} {rest}",
            help=("keep the same number of each, or prune whole KV groups with unit: kv_group",),
        )
    table = tuple(tuple(row) for row in rows)
    return table if view.rows > 1 else table[0]


def _missed(
    name: str, of: str, target: Fraction, total: int, tolerance: Fraction, nearest: Sequence[int]
) -> BudgetError:
    shown = [f"{float(Fraction(value, total)) * 100:.4g}% ({value:,})" for value in nearest]
    return BudgetError.of(
        "budget_missed",
        f"{name}: {float(target):,.6g} of {total:,} {of} cannot be kept within {float(tolerance) * 100:.4g}%",
        notes=("the nearest that can be kept: " + " and ".join(shown),) if shown else (),
        help=("ask for one of these, or allow more under allocate: {tolerance: ...}",),
    )
