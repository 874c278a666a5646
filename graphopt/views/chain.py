"""Residual chains beside which values pass: layers that share keys, or that read the embedding again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.views.trace import same_shape

aten = torch.ops.aten


def chain(nodes: Sequence[fx.Node], residual: set[object], entry: fx.Node | None) -> list[fx.Node]:
    """Points of the longest residual chain within a region, which begins at `entry` where one is given.

    A point is a sum of the stream and a branch that reads the stream: where another branch reads what the sum before it
    read, and not that sum, both run side by side and the sum between them is no point. The first entry is where the chain
    begins. `nodes` are the region's, in graph order; `residual` are the operations that a stream passes.
    """
    behind: dict[fx.Node, int] = {}
    place = {node: i for i, node in enumerate(([entry] if entry is not None else []) + list(nodes))}
    longest: dict[fx.Node, int] = {entry: 0} if entry is not None else {}
    before: dict[fx.Node, tuple[fx.Node, bool]] = {}
    for node in place:
        sources = [source for source in node.all_input_nodes if source in place]
        behind[node] = 0
        for source in sources if node is not entry else ():
            # Sets of places, each the bits of a number.
            behind[node] |= behind[source] | 1 << place[source]
        if node is entry or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if entry is None:
            longest[node] = 0
        if getattr(node.target, "overloadpacket", None) not in residual:
            continue
        for source in sources:
            if source not in longest:
                continue
            joins = _joins(node, source, behind, place)
            if node not in before or longest[source] + joins > longest[node]:
                longest[node], before[node] = longest[source] + joins, (source, joins)
    if not longest:
        return []
    node = max(longest, key=lambda n: (longest[n], -place[n])) if entry is None else list(place)[-1]
    points: list[fx.Node] = []
    while node in before:
        source, joins = before[node]
        points += [node] if joins else []
        node = source
        if joins:
            start = source
    if not points:
        return []
    points = [start, *reversed(points)]
    i = 1
    while i < len(points) - 1:
        read = behind[_branch(points[i + 1], before)]
        if not read >> place[points[i]] & 1 and read >> place[points[i - 1]] & 1:
            del points[i]
        else:
            i += 1
    return points


def _joins(node: fx.Node, source: fx.Node, behind: dict[fx.Node, int], place: dict[fx.Node, int]) -> bool:
    """Whether a node adds to a stream what a branch made of it."""
    if getattr(node.target, "overloadpacket", None) is not aten.add or not same_shape(node, source):
        return False
    others = [a for a in node.args if isinstance(a, fx.Node) and a is not source]
    return len(others) == 1 and others[0] in place and bool(behind[others[0]] >> place[source] & 1)


def _branch(point: fx.Node, before: dict[fx.Node, tuple[fx.Node, bool]]) -> fx.Node:
    return next(a for a in point.args if isinstance(a, fx.Node) and a is not before[point][0])


def shares(points: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The nodes that each point needs and none before it, in graph order; what is left over comes last."""
    inside, found = dict.fromkeys(nodes), []
    for point in points:
        stack, share = [point], set()
        while stack:
            node = stack.pop()
            if node in inside and node not in share:
                share.add(node)
                stack.extend(node.all_input_nodes)
        found.append([node for node in inside if node in share])
        for node in found[-1]:
            del inside[node]
    return [*found, list(inside)]
