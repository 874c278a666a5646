"""Controllers: how many rows the next step may verify. One row means plain decoding, and then no drafter is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from graphopt.runtime.speculate.log import Event


class Controller(Protocol):
    """Chooses a budget before each step from what the steps before it told. It never changes what is emitted.

    `most` is the largest budget that it may choose.
    """

    @property
    def most(self) -> int:
        """The largest budget."""
        ...

    def budget(self) -> int:
        """Rows of the next step, the root included: at least 1."""
        ...

    def told(self, event: Event) -> None:
        """What became of a step."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same budget for every step."""

    rows: int

    @property
    def most(self) -> int:
        """The rows."""
        return self.rows

    def budget(self) -> int:
        """The rows."""
        return self.rows

    def told(self, event: Event) -> None:
        """Nothing is learnt."""


class Goodput:
    """Takes the budget that emits most tokens a second (after SmartSpec, arXiv 2406.14066; the measured rates are ours).

    Seconds and tokens of each budget are moving averages over its own steps. The best budget runs; after `period` steps
    each other budget gets one step again, so that the choice follows text and machine, and as long as the choice
    stays the period doubles, up to 16 times. Budget 1 is always among them: plain decoding then costs what it costs
    without speculation. What is learnt stays for the next sequence.
    """

    def __init__(self, budgets: tuple[int, ...], period: int = 64, memory: float = 0.9, trial: int = 2) -> None:
        self.budgets = tuple(dict.fromkeys((1, *budgets)))
        self.period, self.memory = period, memory
        self._seconds = dict.fromkeys(self.budgets, 0.0)
        self._tokens = dict.fromkeys(self.budgets, 0.0)
        self._queue = [budget for budget in self.budgets for _ in range(trial)]
        self._wait = self._left = period
        self._chosen = self._now = 1

    @property
    def most(self) -> int:
        """The largest of the budgets."""
        return max(self.budgets)

    def budget(self) -> int:
        """The budget under trial, or the best so far."""
        if self._queue:
            self._now = self._queue.pop(0)
            return self._now
        self._now = self.best()
        if self._now != self._chosen:
            self._chosen, self._wait = self._now, self.period
        self._left -= 1
        if self._left < 1:
            self._queue = [budget for budget in self.budgets if budget != self._now]
            self._wait = self._left = min(2 * self._wait, 16 * self.period)
        return self._now

    def best(self) -> int:
        """The budget of the largest rate so far."""
        return max(self.budgets, key=lambda b: self._tokens[b] / self._seconds[b] if self._seconds[b] else 0.0)

    def told(self, event: Event) -> None:
        """Average the step into its budget's rate."""
        for kept, value in ((self._seconds, event.seconds), (self._tokens, float(event.emitted))):
            kept[self._now] = self.memory * kept[self._now] + (1 - self.memory) * value
