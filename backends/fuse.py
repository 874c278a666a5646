"""Partition: which nodes become one kernel.

Every node that the generator can write starts as its own group. A producer joins its consumer when no path leads from
one to the other around them, when the generator can write both as one kernel, and largest intermediates go first,
because the bytes that are no longer written and read are what a fusion saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import fx

from graphopt.backends import loops
from graphopt.backends.emit import CREATIONS, JOINS, TAKE, VIEWS, packet
from graphopt.backends.index import Unfusable
from graphopt.backends.kernel import Kernel, dense_order
from graphopt.backends.packed import UNPACKED
from graphopt.backends.pointwise import CASTS, TRITON, rule_of

aten = torch.ops.aten

MOST_NODES, MOST_INPUTS = 64, 24
COPIES = (aten.clone, aten.lift_fresh_copy, aten.cat, aten.constant_pad_nd, TAKE)

Builder = Callable[[Sequence[fx.Node], Sequence[fx.Node]], Kernel]


@dataclass(eq=False)
class Group:
    """Nodes of one kernel in graph order."""

    nodes: list[fx.Node]
    epoch: int
    kernel: Kernel | None = None
    first: int = 0
    last: int = 0
    dead: bool = field(default=False)


def transparent(node: fx.Node) -> bool:
    """Whether kernels read through a node: views and constants."""
    return node.op == "call_function" and packet(node) in (*VIEWS, *CREATIONS)


def impure(node: fx.Node) -> bool:
    """Whether a node's place in the order matters: it writes, or draws random numbers."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return bool(node.op == "call_module")
    writes: bool = target._schema.is_mutable
    return writes or torch.Tag.nondeterministic_seeded in target.tags


def writable(node: fx.Node, template: Callable[[fx.Node], bool]) -> bool:
    """Whether the generator can write a node at all; `template` says so of products and attention."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype not in TRITON:
        return False
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not tensors or any(t.device != value.device or t.dtype not in TRITON for t in tensors):
        return False
    if any(isinstance(size, int) and size == 0 for t in [value, *tensors] for size in t.shape):
        return False
    if dense_order(value) is None or value.layout != torch.strided:
        return False
    if packet(node) in CASTS:
        return not node.kwargs.keys() - {"dtype", "device", "memory_format", "layout", "pin_memory"} and bool(tensors)
    return (
        rule_of(node) is not None
        or packet(node) in (TAKE, *JOINS, *UNPACKED)
        or loops.is_reduction(node)
        or template(node)
    )


class Partition:
    """Groups of a graph, built by merging."""

    def __init__(self, graph: fx.Graph, build: Builder, template: Callable[[fx.Node], bool] = lambda _: False) -> None:
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.build = build
        self.home: dict[fx.Node, Group] = {}
        self.dag: Any = nx.DiGraph()
        self.declined: dict[str, int] = {}
        epoch = 0
        for node in graph.nodes:
            if impure(node):
                epoch += 1
            if transparent(node):
                continue
            unit: Any = node
            if writable(node, template):
                unit = self.home[node] = Group([node], epoch, first=self.order[node], last=self.order[node])
                self._try(unit)
            self.dag.add_node(unit)
            for source in self.sources(node):
                self.dag.add_edge(self.home.get(source, source), unit)
        for node in list(graph.nodes):
            if node in self.home:
                self._grow(node)
        self._siblings()
        for group in set(self.home.values()):
            if group.kernel is None or all(packet(node) in COPIES for node in group.nodes):
                for node in group.nodes:
                    del self.home[node]

    @property
    def groups(self) -> list[Group]:
        """Groups in the order of their first nodes."""
        return sorted(set(self.home.values()), key=lambda g: g.first)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads, views and constants read through."""
        found: dict[fx.Node, None] = {}
        stack = list(node.all_input_nodes)
        while stack:
            source = stack.pop()
            if transparent(source):
                stack.extend(source.all_input_nodes)
            else:
                found[source] = None
        return list(found)

    def readers(self, node: fx.Node) -> Iterable[fx.Node]:
        """What reads a node, through views."""
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if transparent(user):
                stack.extend(user.users)
            else:
                yield user

    def outputs(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes of a group that something outside reads."""
        inside = set(nodes)
        return [node for node in nodes if any(reader not in inside for reader in self.readers(node))]

    def _try(self, group: Group, nodes: list[fx.Node] | None = None) -> bool:
        """Build a group's kernel with `nodes`; false, with the reason counted, when it cannot be."""
        nodes = group.nodes if nodes is None else nodes
        outputs = self.outputs(nodes)
        if not outputs:
            return False
        try:
            kernel = self.build(nodes, outputs)
        except Unfusable as reason:
            self.declined[str(reason)] = self.declined.get(str(reason), 0) + 1
            return False
        if len(kernel.inputs) > MOST_INPUTS:
            return False
        group.kernel, group.nodes = kernel, nodes
        group.first, group.last = self.order[nodes[0]], self.order[nodes[-1]]
        return True

    def _grow(self, node: fx.Node) -> None:
        """Merge the groups that a node reads into its own, largest intermediates first."""
        tried: set[int] = set()
        while True:
            group = self.home[node]
            found = [
                (bytes_of(source), self.home[source])
                for member in group.nodes
                for source in self.sources(member)
                if source in self.home and self.home[source] is not group and id(self.home[source]) not in tried
            ]
            if not found:
                return
            _, producer = max(found, key=lambda each: each[0])
            tried.add(id(producer))
            if self._merge(producer, group):
                tried.clear()

    def _siblings(self) -> None:
        """Merge groups that read the same tensors, where that is at least half of what one of them reads."""
        readers: dict[fx.Node, list[Group]] = {}
        for group in self.groups:
            if group.kernel is not None:
                for source in group.kernel.inputs:
                    readers.setdefault(source, []).append(group)
        for source, found in readers.items():
            for left, right in pairwise(found):
                alive = [g for g in (left, right) if self.home.get(g.nodes[0]) is g and g.kernel is not None]
                if len(alive) < 2 or left is right or left.first > right.first:
                    continue
                reads = [sum(map(bytes_of, g.kernel.inputs)) for g in alive if g.kernel is not None]
                if 2 * bytes_of(source) >= min(reads) and not self._around(right, left):
                    self._merge(left, right)

    def _merge(self, producer: Group, consumer: Group) -> bool:
        if producer.epoch != consumer.epoch or len(producer.nodes) + len(consumer.nodes) > MOST_NODES:
            return False
        if self._around(producer, consumer):
            return False
        nodes = sorted([*producer.nodes, *consumer.nodes], key=self.order.__getitem__)
        if not self._try(consumer, nodes):
            return False
        for member in producer.nodes:
            self.home[member] = consumer
        for before in list(self.dag.predecessors(producer)):
            if before is not consumer:
                self.dag.add_edge(before, consumer)
        for after in list(self.dag.successors(producer)):
            if after is not consumer:
                self.dag.add_edge(consumer, after)
        self.dag.remove_node(producer)
        return True

    def _around(self, producer: Group, consumer: Group) -> bool:
        """Whether a path leads from one group to the other through a third: merging would close a cycle."""
        stack = [unit for unit in self.dag.successors(producer) if unit is not consumer]
        seen = set(map(id, stack))
        while stack:
            for unit in self.dag.successors(stack.pop()):
                if unit is consumer:
                    return True
                start = unit.first if isinstance(unit, Group) else self.order[unit]
                if id(unit) not in seen and start <= max(consumer.last, producer.last):
                    seen.add(id(unit))
                    stack.append(unit)
        return False


def bytes_of(node: fx.Node) -> int:
    """Bytes of a node's value at the sizes that the graph was traced with."""
    value = node.meta["val"]
    total = int(value.dtype.itemsize)
    for size in value.shape:
        total *= size if isinstance(size, int) else hint(size)
    return total


def hint(size: torch.SymInt) -> int:
    """A symbolic size as it was when the graph was traced; 1 when nothing is known of it."""
    known = getattr(size.node, "hint", None)
    return int(known) if isinstance(known, int) else 1
