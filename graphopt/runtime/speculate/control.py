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

    Seconds and tokens of each budget are moving averages over its own steps. The best budget runs; every `period`
    steps each other budget gets one step, so that the choice follows the text and the machine. Budget 1 is always
    among them: plain decoding costs what it costs without speculation.
    """

    def __init__(self, budgets: tuple[int, ...], period: int = 64, memory: float = 0.9, trial: int = 4) -> None:
        self.budgets = tuple(dict.fromkeys((1, *budgets)))
        self.period, self.memory = period, memory
        self._seconds = dict.fromkeys(self.budgets, 0.0)
        self._tokens = dict.fromkeys(self.budgets, 0.0)
        self._queue = [budget for budget in self.budgets for _ in range(trial)]
        self._now = self.budgets[0]
        self._steps = 0

    @property
    def most(self) -> int:
        """The largest of the budgets."""
        return max(self.budgets)

    def budget(self) -> int:
        """The budget under trial, or the best so far."""
        if not self._queue and self._steps and self._steps % self.period == 0:
            best = self.best()
            self._queue = [budget for budget in self.budgets if budget != best]
        self._now = self._queue.pop(0) if self._queue else self.best()
        self._steps += 1
        return self._now

    def best(self) -> int:
        """The budget of the largest rate so far."""
        return max(self.budgets, key=lambda b: self._tokens[b] / self._seconds[b] if self._seconds[b] else 0.0)

    def told(self, event: Event) -> None:
        """Average the step into its budget's rate."""
        for kept, value in ((self._seconds, event.seconds), (self._tokens, float(event.emitted))):
            kept[self._now] = self.memory * kept[self._now] + (1 - self.memory) * value
