"""The token tree: parent pointers are the only format; masks, depths and paths follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

ONE_HOT = None
"""The q of a drafter that proposes tokens without drawing them: tables, copies, the best of some scores."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Draft tokens behind a root that is already decided: node 0 is the root, parent[i] < i, parent[0] = -1.

    `q` `[N, V]` holds at node i the distribution that i's children were drawn from, without replacement and in the
    order of their indices; ONE_HOT when they were not drawn. Raises ValueError for orphans, a parent that does not come
    first, or two children of one node with the same token.
    """

    token: tuple[int, ...]
    parent: tuple[int, ...]
    q: torch.Tensor | None = ONE_HOT

    def __post_init__(self) -> None:
        if len(self.token) != len(self.parent) or not self.token or self.parent[0] != -1:
            raise ValueError(f"{len(self.token)} tokens and parents {self.parent[:4]}... make no tree")
        if any(not 0 <= parent < node for node, parent in enumerate(self.parent) if node):
            raise ValueError(f"parents come before their children, not {self.parent}")
        if len(set(zip(self.parent, self.token, strict=True))) != len(self.token):
            raise ValueError("two children of one node have the same token")
        if self.q is not None and self.q.shape[0] != len(self.token):
            raise ValueError(f"q has {self.q.shape[0]} rows for {len(self.token)} nodes")

    @staticmethod
    def root(token: int) -> Tree:
        """A tree of the root alone: verifying it is plain decoding."""
        return Tree((token,), (-1,))

    @staticmethod
    def chain(root: int, tokens: Sequence[int], q: torch.Tensor | None = ONE_HOT) -> Tree:
        """Tokens one behind the other."""
        return Tree((root, *tokens), tuple(range(-1, len(tokens))), q)

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, in the order of their indices."""
        found: list[list[int]] = [[] for _ in self.parent]
        for node, parent in enumerate(self.parent[1:], start=1):
            found[parent].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Edges from the root to each node."""
        found = [0]
        for parent in self.parent[1:]:
            found.append(found[parent] + 1)
        return tuple(found)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to a node, both included."""
        found = [node]
        while self.parent[found[-1]] >= 0:
            found.append(self.parent[found[-1]])
        return tuple(reversed(found))

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs on the one before it."""
        return self.parent == tuple(range(-1, len(self) - 1))
