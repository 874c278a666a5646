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
    then the last, counts. Rows wait until a draft is asked for, those of `late` tokens at most and of `reads` plain
    steps, so that text without drafts costs next to nothing. Nothing is proposed behind a token that was not seen. The
    table outlives a sequence unless `remember` is false. Trees of `budgets` are shaped now, so that the first draft, by
    which a controller judges, takes no longer than others.
    """

    def __init__(
        self, ranks: int = 8, remember: bool = True, late: int = 128, reads: int = 32, budgets: tuple[int, ...] = ()
    ) -> None:
        if not 1 <= ranks <= len(_PRIOR):
            raise ValueError(f"a line holds 1 to {len(_PRIOR)} tokens, not {ranks}")
        self.ranks, self.remember, self.late, self._reads = ranks, remember, late, reads
        for budget in budgets:
            _template(ranks, budget)
        self._lines: dict[int, list[int]] = {}
        self._waiting: list[tuple[list[int], torch.Tensor]] = []

    @property
    def reads(self) -> int:
        """The last plain steps that renew lines."""
        return self._reads

    @property
    def table(self) -> dict[int, list[int]]:
        """The likeliest tokens behind each token, in turn, by all rows that have come."""
        for tokens, logits in self._waiting:
            self._lines.update(zip(tokens, logits.topk(self.ranks, dim=-1).indices.tolist(), strict=True))
        self._waiting = []
        return self._lines

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Take the prompt's rows."""
        if not self.remember:
            self._lines, self._waiting = {}, []
        self._take(rows, range(len(rows.token)))

    def propose(self, root: int, budget: int) -> Tree:
        """A tree of at most `budget` nodes: candidates of candidates, as far as their lines are known."""
        shape, table = _template(self.ranks, budget), self.table
        token, parent = [root], [-1]
        place: dict[tuple[int, ...], int] = {(): 0}
        for path in shape.ordered:
            above = place.get(path[:-1])
            line = table.get(token[above]) if above is not None else None
            if above is not None and line is not None:
                place[path] = len(token)
                token.append(line[path[-1]])
                parent.append(above)
        return Tree(tuple(token), tuple(parent))

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Take every row of the tree."""
        depth = [0]
        for above in rows.parent[1:]:
            depth.append(depth[above] + 1)
        self._take(rows, sorted(range(rows.first, len(depth)), key=depth.__getitem__))

    def truncate(self, length: int) -> None:
        """The table holds no places."""

    def _take(self, rows: Rows, order: range | list[int]) -> None:
        last = {rows.token[node]: node for node in order[-self.late :]}
        self._waiting.append((list(last), rows.logits[[node - rows.first for node in last.values()]]))
        while sum(len(tokens) for tokens, _ in self._waiting[1:]) >= self.late:
            del self._waiting[0]


@cache
def _template(ranks: int, budget: int) -> Template:
    return best_paths(torch.tensor([_PRIOR[:ranks]] * LEVELS), budget - 1)
