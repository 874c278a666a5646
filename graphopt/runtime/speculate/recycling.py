"""Drafting from the program's own leftovers: Token Recycling (arXiv 2408.08696)."""

from __future__ import annotations

from functools import cache

import torch

from graphopt.runtime.speculate.build import Template, best_paths
from graphopt.runtime.speculate.drafter import Rows
from graphopt.runtime.speculate.tree import Tree

# How often rank r is right when its level is reached, for the shape of the tree alone: ranks fall off like 1 / r, so
# that most nodes stand behind first candidates.
_PRIOR = (0.45, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.02)
LEVELS = 6


class Recycle:
    """A table of the `ranks` likeliest tokens behind each token, as the program last scored them, drafts a tree.

    Every row that the program returns, kept or not, renews its token's line; of several rows of one token the deepest,
    then the last, counts. Lines are -1 until their token was seen, and nothing is proposed behind such a token. The
    table outlives a sequence unless `remember` is false.
    """

    def __init__(self, ranks: int = 8, remember: bool = True) -> None:
        if not 1 <= ranks <= len(_PRIOR):
            raise ValueError(f"a line holds 1 to {len(_PRIOR)} tokens, not {ranks}")
        self.ranks, self.remember = ranks, remember
        self.table: dict[int, list[int]] = {}

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Learn from the prompt's rows."""
        if not self.remember:
            self.table = {}
        self._learn(rows, range(len(rows.token)))

    def propose(self, root: int, budget: int) -> Tree:
        """A tree of at most `budget` nodes: candidates of candidates, as far as their lines are known."""
        shape = _template(self.ranks, budget)
        token, parent = [root], [-1]
        place: dict[tuple[int, ...], int] = {(): 0}
        for path in shape.ordered:
            above = place.get(path[:-1])
            line = self.table.get(token[above]) if above is not None else None
            if above is not None and line is not None:
                place[path] = len(token)
                token.append(line[path[-1]])
                parent.append(above)
        return Tree(tuple(token), tuple(parent))

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Learn from every row of the tree."""
        depth = [0]
        for above in rows.parent[1:]:
            depth.append(depth[above] + 1)
        self._learn(rows, sorted(range(len(depth)), key=depth.__getitem__))

    def truncate(self, length: int) -> None:
        """The table holds no places."""

    def _learn(self, rows: Rows, order: range | list[int]) -> None:
        last = {rows.token[node]: node for node in order}
        lines = rows.logits[list(last.values())].topk(self.ranks, dim=-1).indices.tolist()
        self.table.update(zip(last, lines, strict=True))


@cache
def _template(ranks: int, budget: int) -> Template:
    return best_paths(torch.tensor([_PRIOR[:ranks]] * LEVELS), budget - 1)
