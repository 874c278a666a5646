"""Reading a dense feed-forward neuron by neuron: which rows of its weights make each neuron, and the arithmetic between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.rewriter import Rewriter
from graphopt.views import FeedForward, Linear, Views
from graphopt.views.trace import ACTIVATIONS, activation, elementwise_sources, spelled

aten = torch.ops.aten
_KEEP_ROWS = {aten.view, aten.reshape, aten._unsafe_view, aten.contiguous, aten.clone}
_ARITHMETIC = {*ACTIVATIONS, aten.to}


class Unfit(Exception):
    """Why a feed-forward cannot be split into experts."""


@dataclass(frozen=True, eq=False)
class Half:
    """A side of the first products: neuron j is row `rows[j]` of the output axis of `linear`."""

    linear: Linear
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Dense:
    """A feed-forward as its neurons: `inner` are the pointwise nodes between the halves and the down projection.

    `starts` are the nodes at which the halves enter the arithmetic; `x` is what the block reads, `[..., d]`.
    """

    view: FeedForward
    x: fx.Node
    up: Half
    gate: Half | None
    starts: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]

    @property
    def halves(self) -> tuple[Half, ...]:
        """The gate, when there is one, and the up projection."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def replay(self, rewriter: Rewriter, call: Callable[..., fx.Node], halves: tuple[fx.Node, ...]) -> fx.Node:
        """The arithmetic again, on other values `[N, n]` in place of `halves`."""
        made = dict(zip(self.starts, halves, strict=True))
        for node in self.inner:
            packet = getattr(node.target, "overloadpacket", None)
            if packet in _KEEP_ROWS:
                made[node] = made[node.args[0]]  # type: ignore[index]
                continue

            def now(source: fx.Node) -> fx.Node:
                return made[source] if source in made else rewriter.node(source)

            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), now)
            made[node] = call(node.target, *args)
            made[node].kwargs = kwargs
        return made[self.view.down.x]


def read_dense(views: Views, view: FeedForward) -> Dense:
    """The neurons of a feed-forward; raises Unfit with the reason when something between them is no plain arithmetic."""
    between, products = elementwise_sources(views.labels, view.down.x)
    order = {node: i for i, node in enumerate(views.program.graph.graph.nodes)}
    inner = sorted(between, key=order.__getitem__)
    if len(products) == 1:
        up, gate, starts = _packed(view, products[0], inner)
    else:
        gate = None if view.gate is None else Half(view.gate, tuple(range(view.neurons)))
        up = Half(view.up, tuple(range(view.neurons)))
        starts = (view.up.node,) if view.gate is None else (view.gate.node, view.up.node)
    x = view.up.x
    if view.gate is not None and view.gate.x is not x:
        raise Unfit("its gate and up projections read different nodes")
    behind = set(starts)
    for node in _layouts_before(inner, starts):
        inner.remove(node)
    for node in inner:
        _check(node, behind, view.neurons)
        behind.add(node)
    return Dense(view, x, up, gate, starts, tuple(inner))


def _check(node: fx.Node, behind: set[fx.Node], neurons: int) -> None:
    packet = getattr(node.target, "overloadpacket", None)
    value = node.meta["val"]
    if packet in _KEEP_ROWS:
        if value.shape[-1] != neurons:
            raise Unfit(f"%{node.name} rearranges its neurons")
        return
    if packet not in _ARITHMETIC and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        raise Unfit(f"%{node.name} = {node.target} is no arithmetic on single neurons")
    for source in node.all_input_nodes:
        if source in behind:
            continue
        other = source.meta.get("val")
        if isinstance(other, torch.Tensor) and other.numel() != 1:
            raise Unfit(f"%{node.name} reads %{source.name}, which is not made by its projections")


def _packed(view: FeedForward, product: Linear, inner: list[fx.Node]) -> tuple[Half, Half | None, tuple[fx.Node, ...]]:
    """The halves of one product: where layout operations take its neurons apart, by row numbers."""
    whole = int(product.node.meta["val"].shape[-1])
    if whole == view.neurons:
        return Half(product, tuple(range(whole))), None, (product.node,)
    rows: dict[fx.Node, Any] = {product.node: tuple(range(whole))}
    for node in inner:
        source = node.args[0] if node.args else None
        if source in rows:
            found = _rows_of(node, rows[source])  # type: ignore[index]
            if found is not None:
                rows[node] = found
    ends = [node for node, found in rows.items() if isinstance(found, tuple) and len(found) == view.neurons]
    starts = [node for node in ends if node.args[0] not in ends]
    if len(starts) != 2:
        raise Unfit(f"{product.weight} packs its halves in a way that cannot be taken apart")
    behind: set[fx.Node] = set()
    for node in inner:
        if activation(node) or spelled(node):
            behind.add(node)
            break
    stack = list(behind)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in behind and source.op == "call_function":
                behind.add(source)
                stack.append(source)
    gates = [node for node in starts if node in behind]
    if len(gates) != 1:
        raise Unfit("its activation reads both halves of a packed projection")
    up = next(node for node in starts if node is not gates[0])
    return Half(product, rows[up]), Half(product, rows[gates[0]]), (gates[0], up)


def _rows_of(node: fx.Node, rows: Any) -> Any:
    """Row numbers of a layout operation's result, a list of them for a split; None for anything else."""
    packet = getattr(node.target, "overloadpacket", None)
    if getattr(node.target, "__name__", "") == "getitem":
        return rows[node.args[1]] if isinstance(rows, list) else None
    if not isinstance(rows, tuple):
        return None
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    if packet in _KEEP_ROWS:
        return rows if node.meta["val"].shape[-1] == len(rows) else None
    if packet in (aten.split, aten.split_with_sizes, aten.chunk):
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        if dim % rank != rank - 1:  # type: ignore[operator]
            return None
        pieces, start = [], 0
        for value in node.meta["val"]:
            pieces.append(rows[start : start + value.shape[-1]])
            start += value.shape[-1]
        return pieces
    if packet is aten.slice and (node.args[1] if len(node.args) > 1 else 0) % rank == rank - 1:  # type: ignore[operator]
        return rows[slice(*(node.args[i] if len(node.args) > i else None for i in (2, 3, 4)))]
    return None


def _layouts_before(inner: list[fx.Node], starts: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The nodes that take a packed product apart, and the halves themselves."""
    found, stack = set(starts), list(starts)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in inner and source not in found:
                found.add(source)
                stack.append(source)
    return [node for node in inner if node in found]
