"""What nodes of a graph depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The given nodes and all that they depend on."""
    stack = list(nodes)
    seen = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen
