"""What a method of speculation provides: a drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from graphopt.runtime.cache import Cache
from graphopt.runtime.speculate.tree import Tree


@dataclass(frozen=True)
class Rows:
    """What the program returned for N tokens that it read in one run.

    `outputs` maps result names to rows `[N, ...]`; `logits` `[N, V]` is the first of them. `cache` is what the program
    wrote: a drafter may read its committed entries, and use the slots behind them between two steps.
    """

    token: tuple[int, ...]
    parent: tuple[int, ...]
    logits: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    cache: Cache


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
