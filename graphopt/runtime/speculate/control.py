"""Controllers: how many rows the next step may verify. One row means plain decoding, and then no drafter is asked."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from graphopt.runtime.speculate.log import Event

_PAUSE = 4
"""Steps with drafts behind a trial that was too dear before the next one is thought of: thinking, too, takes time."""
_LEAST = 5
"""By how much a row of hopeless trials may divide what the purse gains."""
_RECENT = 16
"""Steps whose seconds count: fewer than those whose tokens do, as a machine changes its speed sooner than a text."""
_PLAIN = 16
"""Plain steps of one trial: the first behind steps of several rows, which read other copies of the weights, takes twice
the time of the next ones."""
_MARGIN = 1.05
"""By how much drafting must be better than none: text that was easy gets hard again."""
_INVEST = 0.1
"""Share of the seconds that drafts save which may look for a better budget, until trials show none."""
_ALWAYS = 1 << 30


class Controller(Protocol):
    """Chooses a budget before each step from what the steps before it told. It never changes what is emitted.

    Before each step `pause` is asked, and `budget` when it gave none. A step has fewer rows where fewer tokens are left.
    """

    def pause(self) -> int:
        """Plain steps that come next whatever they tell: fewer may come, at once told of."""
        ...

    def budget(self) -> int:
        """Rows of the next step, the root included: at least 1."""
        ...

    def told(self, event: Event, count: int = 1) -> None:
        """What became of a step, or of so many plain ones."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same budget for every step."""

    rows: int

    def pause(self) -> int:
        """Forever when one row is all, else never."""
        return _ALWAYS if self.rows == 1 else 0

    def budget(self) -> int:
        """The rows."""
        return self.rows

    def told(self, event: Event, count: int = 1) -> None:
        """Nothing is learnt."""


class Goodput:
    """Takes the budget that emits most tokens a second (after SmartSpec, arXiv 2406.14066), and bounds what trials cost.

    Tokens of each budget are means over its last `memory` steps, seconds over fewer; plain steps count in runs of
    several. The best budget runs, one with drafts if it is better than none by a margin. Another one gets a step (plain
    decoding a run of them) when what that is expected to lose to the best is in the purse. The purse begins with `start`
    plain steps, gains `share` of all seconds, and pays what trials lose: speculation that does not pay costs that share of
    the time and `start` steps once, however long the text, while trials that lose nothing go on until the best is known.
    Where drafts pay, trials of other drafts have a purse of their own, which gains as much and a tenth of what drafts save,
    so that a better number of rows is soon found. A trial is hopeless when its budget would not be the best either if one
    step more had all of its rows accepted; after n hopeless trials in a row, none of which changed the best, purses gain
    an n-th of the share, down to a fifth, and an n-th squared of that tenth. Of those beside drafts that pay only the last
    quarter of `memory` counts, as text changes; to begin drafting takes more. The
    first trial of a budget has two steps, because the first one may warm something up, unless drafting alone took
    twice what it gave, and is expected to cost what its rows do, as far as two other budgets tell. Budget 1 is always
    among them: plain decoding then costs what it costs without speculation. Steps for which nothing was drafted count
    for no budget. What is learnt stays for the next sequence.
    """

    def __init__(self, budgets: tuple[int, ...], start: float = 2.0, share: float = 0.005, memory: int = 32) -> None:
        self.budgets = tuple(sorted({1, *budgets}))
        self.start, self.share = start, share
        self._tried = max(2, memory // 4)
        self._steps: dict[int, deque[tuple[float, int]]] = {b: deque(maxlen=memory) for b in self.budgets}
        self._means: dict[int, tuple[float, float]] = {}
        self._last = dict.fromkeys(self.budgets, 0)
        self._count = self._ask = 0
        self._purse = self._saved = 0.0
        self._now = self._best = 1
        self._again = self._hopeless = 0
        self._settled = False

    def pause(self) -> int:
        """Plain steps until the purse pays the next trial, while nothing is better than plain steps."""
        self._now = self._best
        if len(self.budgets) == 1:
            return _ALWAYS
        if self._best != 1:
            if self._count < self._ask or self._next() != 1 or self._short(1) > 0:
                return 0
            self._now = 1
            return _PLAIN
        if 1 not in self._means:
            return 1
        short = self._short(self._next())
        return math.ceil(short / (self._gain * self._means[1][0])) if short > 0 else 0

    def budget(self) -> int:
        """The budget under trial, or the best so far."""
        self._now = self._best
        if self._count >= self._ask and 1 in self._means:
            trial = self._next()
            if self._short(trial) <= 0:
                self._now = trial
            else:
                self._ask = self._count + _PAUSE
        return self._now

    def best(self) -> int:
        """The budget of the largest rate so far."""
        return self._best

    def told(self, event: Event, count: int = 1) -> None:
        """Count the steps among their budget's, and pay for one that was a trial."""
        now, steps = self._now, self._steps[self._now]
        seconds = max(event.seconds, 1e-9)
        self._count += count
        self._last[now] = self._count
        if event.rows == 1 < now:
            # A drafter that found nothing to propose tells nothing of what its drafts are worth.
            if now != self._best:
                self._pay(event.drafting)
            return
        if now == 1 and self._in_passing(count):
            self._purse += self._gain * seconds * count if now == self._best else 0.0
            return
        steps.append((seconds, event.emitted))
        while 1 < self._best != now and len(steps) > self._tried:
            steps.popleft()
        if now == self._best:
            self._purse += self._gain * seconds * count
            if now > 1:
                saved = event.emitted * self._means[1][0] - seconds
                self._saved += self._gain * seconds + max(0.0, saved) * _INVEST / max(self._hopeless, 1) ** 2
        elif now == self._again:
            self._again = 0
            usual = min(steps)[0]
            self._pay(2 * usual, steps[0][1] + event.emitted)
            steps[0], steps[1] = (usual, steps[0][1]), (usual, event.emitted)
        elif len(steps) == 1 and event.drafting < (2 * event.emitted - 1) * self._means[1][0]:
            self._again = now
        else:
            # Rows cost at most a plain step each; what verifying takes above that is an interruption.
            cost = event.drafting + min(seconds - event.drafting, now * self._means[1][0])
            self._pay(cost * count, event.emitted * count)
            if len(steps) == 1:
                steps[0] = (cost, event.emitted)
        if now != self._again and (now > 1 or len(steps) > 1):
            if 1 not in self._means:
                self._purse += self.start * min(each for each, _ in steps)
            self._means[now] = _means(steps)
            before, self._best = self._best, min(self._means, key=self._cost)
            if self._best != before:
                self._hopeless = 0
            elif now != before:
                self._hopeless = 0 if self._may_pay(now) else self._hopeless + 1

    def _in_passing(self, count: int) -> bool:
        """Whether plain steps are too few to tell what one takes; those before the first run that is long do not count then.

        Of a few, too many are the first one behind rows.
        """
        if count < _PLAIN // 2:
            return self._settled
        if not self._settled:
            self._settled = True
            self._steps[1].clear()
        return False

    def _cost(self, budget: int) -> float:
        """Seconds a token, with a surcharge for drafting."""
        seconds, tokens = self._means[budget]
        return seconds / tokens * (_MARGIN if budget > 1 else 1.0)

    @property
    def _gain(self) -> float:
        """The share of seconds that the purse gains now."""
        return self.share / min(max(self._hopeless, 1), _LEAST)

    def _may_pay(self, budget: int) -> bool:
        """Whether a budget would be the best if one step more had all of its rows accepted."""
        (seconds, tokens), count = self._means[budget], len(self._steps[budget])
        best_seconds, best_tokens = self._means[self._best]
        return seconds * best_tokens <= best_seconds * (tokens * count + budget) / (count + 1)

    def _next(self) -> int:
        """The budget to try next: the one that had half of its first trial, else the one whose last step is longest ago;
        drafts do not wait until plain steps can be paid."""
        others = [budget for budget in self.budgets if budget != self._best]
        if len(others) > 1 < self._best and self._short(1) > 0:
            others.remove(1)
        return self._again or min(others, key=self._last.__getitem__)

    def _short(self, trial: int) -> float:
        """Seconds that are lacking for a trial."""
        purse = self._saved if trial > 1 < self._best else self._purse
        return 0.0 if trial == self._again else self._loss(trial) - purse

    def _pay(self, seconds: float, tokens: int = 0) -> None:
        """Take what the trial lost from the purse that it is paid by."""
        best_seconds, best_tokens = self._means[self._best]
        lost = max(0.0, seconds - tokens * best_seconds / best_tokens)
        if self._now > 1 < self._best:
            self._saved -= lost
        else:
            self._purse -= lost

    def _loss(self, budget: int) -> float:
        """Seconds that a trial of a budget is expected to lose to the best one: of two steps at first, then of one."""
        count = _PLAIN if budget == 1 else 1
        if budget in self._means:
            seconds, tokens = self._means[budget]
        else:
            count = 2
            known = sorted(self._means, key=lambda b: abs(b - budget))[:2]
            seconds, tokens = self._means[known[0]]
            if len(known) > 1:
                slope = (seconds - self._means[known[1]][0]) / (known[0] - known[1])
                seconds += max(0.0, slope) * (budget - known[0])
        best_seconds, best_tokens = self._means[self._best]
        return count * (seconds - tokens * best_seconds / best_tokens)


def _means(steps: deque[tuple[float, int]]) -> tuple[float, float]:
    """Mean seconds and tokens of steps; seconds far above the middle ones are an interruption, not the step's."""
    recent = sorted(seconds for seconds, _ in islice(reversed(steps), _RECENT))
    middle = recent[(len(recent) - 1) // 2]
    usual = [seconds for seconds in recent if seconds <= 4 * middle]
    return sum(usual) / len(usual), sum(tokens for _, tokens in steps) / len(steps)
