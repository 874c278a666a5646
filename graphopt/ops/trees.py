"""Token trees from parent pointers: which node sees which follows from when a walk in depth enters and leaves them.

A node sees itself and its ancestors: those that the walk has entered before it and not left yet. Two numbers a node say
so, whatever the size of the tree; ordinary text is a tree with one branch. Shapes: B rows, S new tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=512)
def walk(parents: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """When each node is entered and left, `[B, 2, S]`, and how deep it stands, `[B, S]`; remembered, because trees repeat.

    Row by row `parents[i] < i`, -1 for a root. Raises ValueError for anything else.
    """
    spans, depths = [], []
    for row in parents:
        if any(not -1 <= parent < node for node, parent in enumerate(row)):
            raise ValueError(f"parents come before their children, not {row}")
        sizes, entry, depth = [1] * len(row), [0] * len(row), [0] * len(row)
        for node in reversed(range(len(row))):
            if row[node] >= 0:
                sizes[row[node]] += sizes[node]
        # Where the next child of a node is entered; that of no node is the next root.
        free = {-1: 0}
        for node, parent in enumerate(row):
            entry[node] = free[parent]
            free[parent] += sizes[node]
            free[node] = entry[node] + 1
            depth[node] = depth[parent] + 1 if parent >= 0 else 0
        spans.append([entry, [first + size for first, size in zip(entry, sizes, strict=True)]])
        depths.append(depth)
    return torch.tensor(spans), torch.tensor(depths)


def straight(count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The walk of ordinary text, `[1, 2, S]`: each token is entered behind the one before, and left at the end."""
    steps = torch.arange(count, device=device)
    return torch.stack([steps, torch.full_like(steps, count)])[None]


def is_straight(spans: torch.Tensor) -> bool:
    """Whether each token sees all before it."""
    entry, left = spans[:, 0], spans[:, 1]
    steps = torch.arange(spans.shape[2], device=spans.device)
    return bool((entry == steps).all()) and bool((left >= spans.shape[2]).all())


def sees(spans: torch.Tensor) -> torch.Tensor:
    """Whether node i sees node j, bool `[B, S, S]`: for references, which may write it down."""
    entry, left = spans[:, 0], spans[:, 1]
    return (entry[:, None] <= entry[:, :, None]) & (entry[:, :, None] < left[:, None])
