"""What a method of speculation provides: a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from graphopt.runtime.cache import Cache
from graphopt.runtime.speculate.tree import Tree


class Rows:
    """What the program returned for N tokens that it read in one run.

    `logits` `[N, V]` is the first result, and `outputs` maps the names of all results to rows `[N, ...]`; both are cut
    out of what the run returned when they are asked for, as plain steps often have no reader. `cache` is what the
    program wrote: a drafter may read its committed entries, and use the slots behind them between two steps. Of plain
    steps in a row, results are there from token `first` on.
    """

    __slots__ = ("_runs", "cache", "first", "names", "parent", "token")

    def __init__(
        self,
        token: tuple[int, ...],
        parent: tuple[int, ...],
        results: Sequence[torch.Tensor],
        names: Sequence[str],
        cache: Cache,
    ) -> None:
        self.token, self.parent, self.names, self.cache = token, parent, names, cache
        self.first = 0
        self._runs: Sequence[Sequence[torch.Tensor]] = (results,)

    @classmethod
    def one_by_one(
        cls, token: tuple[int, ...], runs: Sequence[Sequence[torch.Tensor]], names: Sequence[str], cache: Cache
    ) -> Rows:
        """Rows of tokens that stand one behind the other and were read in a run each, of which the last are given."""
        rows = cls(token, tuple(range(-1, len(token) - 1)), (), names, cache)
        rows._runs, rows.first = runs, len(token) - len(runs)
        return rows

    @property
    def logits(self) -> torch.Tensor:
        """The first result."""
        return self._rows(0)

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Rows of every result by its name."""
        return {name: self._rows(index) for index, name in enumerate(self.names)}

    def of(self, name: str, node: int) -> torch.Tensor:
        """One row of a result."""
        index = self.names.index(name)
        runs = self._runs
        return runs[0][index][0, node - self.first] if len(runs) == 1 else runs[node - self.first][index][0, 0]

    def _rows(self, index: int) -> torch.Tensor:
        runs = self._runs
        return runs[0][index][0] if len(runs) == 1 else torch.cat([results[index][0] for results in runs])


class Drafter(Protocol):
    """Proposes token trees. All calls of one sequence come in this order: begin, then (propose?, observe) again and again.

    A controller may leave `propose` out of steps; `observe` is then told about all tokens of such steps at once, the
    first one's root included, with the results of those of them that may be among the last `reads` before a draft, and
    of the last one.
    """

    @property
    def reads(self) -> int:
        """Of how many plain steps before a draft the results count. Those of more are not kept, which would take time."""
        ...

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """A new sequence: its prompt, and what the program returned for each token of it."""
        ...

    def propose(self, root: int, budget: int) -> Tree:
        """A tree of at most `budget` nodes behind `root`, which is decided and not yet read by the program."""
        ...

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """What the program returned for the tree, and the nodes of it that were kept, the root first."""
        ...

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` tokens of the sequence (prompt included)."""
        ...
