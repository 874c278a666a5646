"""Tree builders: from what a drafter scores to a tree within a budget of rows."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from graphopt.runtime.speculate.tree import Tree


@dataclass(frozen=True)
class Template:
    """A static tree by rank paths: (0, 2) is the third candidate behind the first one.

    Raises ValueError for a path that stands twice or whose beginning is missing.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        known = set(self.paths)
        if len(known) != len(self.paths):
            raise ValueError("a path of the template stands twice")
        for path in self.paths:
            if not path or min(path) < 0 or (len(path) > 1 and path[:-1] not in known):
                raise ValueError(f"path {path} of the template hangs on nothing")

    @cached_property
    def ordered(self) -> tuple[tuple[int, ...], ...]:
        """Paths breadth first."""
        return tuple(sorted(self.paths, key=lambda path: (len(path), path)))

    @cached_property
    def parent(self) -> tuple[int, ...]:
        """Parent pointers, the root first."""
        place = {path: i for i, path in enumerate(((), *self.ordered))}
        return (-1, *(place[path[:-1]] for path in self.ordered))

    @cached_property
    def levels(self) -> int:
        """Edges from the root to the deepest node."""
        return max((len(path) for path in self.paths), default=0)

    @cached_property
    def ranks(self) -> int:
        """Candidates that a level needs."""
        return 1 + max((rank for path in self.paths for rank in path), default=0)

    def cut(self, budget: int) -> Template:
        """The first paths, so that the tree has at most `budget` nodes, root included."""
        return self if len(self.paths) < budget else Template(self.ordered[: max(0, budget - 1)])


def widths(counts: Sequence[int]) -> Template:
    """`counts[l]` candidates behind every node of level l."""
    paths: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for count in counts:
        level = [(*path, rank) for path in level for rank in range(count)]
        paths += level
    return Template(tuple(paths))


def best_paths(accuracy: torch.Tensor, nodes: int) -> Template:
    """The template of `nodes` paths with the largest products of accuracies.

    `accuracy` `[levels, ranks]` says how often rank r of a level was right on held-out text.
    """
    logs: list[list[float]] = accuracy.clamp_min(1e-9).log().tolist()
    return Template(tuple(path for path, _ in _best_first(lambda depth: logs[depth], len(logs), nodes)))


def from_template(template: Template, root: int, candidates: Sequence[Sequence[int]]) -> Tree:
    """The tree of a template: `candidates[l][r]` is the token of rank r at level l, on whatever path (Medusa)."""
    return Tree((root, *(candidates[len(path) - 1][path[-1]] for path in template.ordered)), template.parent)


def best_first(root: int, candidates: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], budget: int) -> Tree:
    """The tree of at most `budget` nodes with the largest sums of log-probabilities along their paths.

    `candidates[l]` and `scores[l]` are tokens of level l and their log-probabilities, likeliest first.
    """
    token, parent = [root], [-1]
    place: dict[tuple[int, ...], int] = {(): 0}
    for path, _ in _best_first(lambda depth: scores[depth], len(scores), budget - 1):
        place[path] = len(token)
        token.append(candidates[len(path) - 1][path[-1]])
        parent.append(place[path[:-1]])
    return Tree(tuple(token), tuple(parent))


def _best_first(
    scores: Callable[[int], Sequence[float]], levels: int, count: int
) -> Iterable[tuple[tuple[int, ...], float]]:
    """Paths in falling order of their sums of scores; scores of a level fall with the rank, and none is above 0."""
    if levels == 0 or count <= 0:
        return
    first = scores(0)[0]
    heap: list[tuple[float, tuple[int, ...], float]] = [(-first, (0,), 0.0)]
    for _ in range(count):
        if not heap:
            return
        negative, path, before = heapq.heappop(heap)
        yield path, -negative
        level, rank = len(path) - 1, path[-1] + 1
        if rank < len(scores(level)):
            heapq.heappush(heap, (-(before + scores(level)[rank]), (*path[:-1], rank), before))
        if level + 1 < levels:
            heapq.heappush(heap, (negative - scores(level + 1)[0], (*path, 0), -negative))
