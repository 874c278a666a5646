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
    out of `results` `[1, N, ...]` when they are asked for, as a plain step often has no reader. `cache` is what the
    program wrote: a drafter may read its committed entries, and use the slots behind them between two steps.
    """

    __slots__ = ("cache", "names", "parent", "results", "token")

    def __init__(
        self,
        token: tuple[int, ...],
        parent: tuple[int, ...],
        results: Sequence[torch.Tensor],
        names: Sequence[str],
        cache: Cache,
    ) -> None:
        self.token, self.parent, self.results, self.names, self.cache = token, parent, results, names, cache

    @property
    def logits(self) -> torch.Tensor:
        """The first result."""
        return self.results[0][0]

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Rows of every result by its name."""
        return {name: result[0] for name, result in zip(self.names, self.results, strict=True)}


class Drafter(Protocol):
    """Proposes token trees. All calls of one sequence come in this order: begin, then (propose?, observe) again and again.

    A controller may leave `propose` out of a step; `observe` is then told about the root alone.
    """

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
