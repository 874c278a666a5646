"""How labels pass through choices: top-k, tables that are read by index, products with a bank of expert matrices.

A tensor of indices remembers the axis that it numbers, so that the rows which a router chooses and the matrices which
are read by its choice share one axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.views.atoms import Atom, Axis, Choice, leaves, lock, unify
from graphopt.views.layouts import Axes, LayoutRules
from graphopt.views.sizes import Rank, op_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight: y = x W^T + b (`in_axis` 1) or x W + b (`in_axis` 0, the Conv1D layout).

    A product with a bank of expert matrices reads a weight of three axes, the first of which numbers the experts;
    `index` is the tensor that chooses a matrix for each row (None when every expert sees its own rows). `reader` is the
    node that takes `x` in: the product itself, or the reshape before it.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    in_axis: int
    reader: fx.Node
    bank: bool = False
    index: fx.Node | None = None

    @property
    def out_axis(self) -> int:
        """The weight's output axis."""
        return (3 if self.bank else 1) - self.in_axis


def behind(node: fx.Node) -> fx.Node:
    """What a product reads, behind casts and reshapes that a model may repeat for each product."""
    layout = (aten.view, aten.reshape, aten.to, aten.contiguous, aten.repeat_interleave, aten.expand, aten.unsqueeze)
    while getattr(node.target, "overloadpacket", None) in layout:
        node = node.args[0]  # type: ignore[assignment]
    return node


@dataclass(frozen=True)
class _Gathered:
    """Matrices of a bank: all of them, or those that `index` chooses; `turned` when transposed since."""

    weight: str
    index: fx.Node | None
    turned: bool = False


class RoutingRules(LayoutRules):
    """Rules for top-k, gathers, indexing and products with banks."""

    linears: dict[fx.Node, Linear]
    bank_linears: dict[fx.Node, Linear]
    weight_axes: dict[str, Axes]
    numbers: dict[fx.Node, Axis]
    choices: dict[fx.Node, int]
    _gathered: dict[fx.Node, _Gathered]

    def _follow(self, node: fx.Node) -> None:
        """Let what a tensor of indices numbers, and what a tensor of matrices is, pass through layout operations."""
        source = node.args[0] if node.args else None
        value = node.meta.get("val")
        if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor):
            return
        if source in self.numbers and not value.dtype.is_floating_point and value.dtype != torch.bool:
            self.numbers.setdefault(node, self.numbers[source])
        packet = getattr(node.target, "overloadpacket", None)
        found = self._matrices(source)
        if found is None:
            return
        if packet in (aten.to, aten.contiguous, aten.clone):
            self._gathered[node] = found
        elif packet in (aten.transpose, aten.mT):
            ends = {a % 3 for a in node.args[1:3]} if packet is aten.transpose else {1, 2}  # type: ignore[operator]
            if ends == {1, 2}:
                self._gathered[node] = _Gathered(found.weight, found.index, not found.turned)

    def _matrices(self, node: fx.Node) -> _Gathered | None:
        if node in self._gathered:
            return self._gathered[node]
        bank = "weight" in node.meta and node.meta["val"].dim() == 3
        return _Gathered(node.meta["weight"], None) if bank else None

    def _top_k(self, node: fx.Node) -> list[Axes]:
        axes = self._same(node)
        values, _ = node.meta["val"]
        given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
        dim = given % len(axes)  # type: ignore[operator]
        largest = len(node.args) < 4 or bool(node.args[3])
        self._choose(node, axes[dim], dim, node.target is aten.topk.default and largest)
        chosen = self._fresh(values)[dim]
        return [[*axes[:dim], chosen, *axes[dim + 1 :]] for _ in range(2)]

    def _choose(self, node: fx.Node, axis: Axis, dim: int, best: bool) -> None:
        """Note that a node chooses among the entries of an axis of its input; `best` when it takes the highest."""
        self.numbers[node] = axis
        reason = f"{op_name(node)} at %{node.name} chooses among it"
        if best:
            self.choices[node] = dim
        lock(axis, Choice(reason) if best else reason)

    def experts(self) -> set[Atom]:
        """Leaves that number the matrices of banks."""
        return {leaf for linear in self.bank_linears.values() for leaf in leaves(self.weight_axes[linear.weight][0])}

    def _arg_top(self, node: fx.Node) -> Axes | None:
        axes = self._same(node)
        if len(node.args) < 2 or not isinstance(node.args[1], int):
            return None
        dim = node.args[1] % len(axes)
        self._choose(node, axes[dim], dim, node.target is aten.argmax.default)
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        return [*axes[:dim], *([()] if keep else []), *axes[dim + 1 :]]

    def _chosen(self, axis: Axis, index: fx.Node, node: fx.Node) -> None:
        """An axis of which `index` chooses entries."""
        numbered = self.numbers.get(index)
        if numbered is None:
            lock(axis, f"{op_name(node)} at %{node.name} reads entries by number")
        else:
            unify(axis, numbered, f"entries chosen at %{node.name}")

    def _gather(self, node: fx.Node) -> Axes:
        source, given, index = node.args[:3]
        axes, picked = self._same(node), list(self.of(index))  # type: ignore[arg-type]
        dim = given % len(axes)  # type: ignore[operator]
        self._chosen(axes[dim], index, node)  # type: ignore[arg-type]
        sizes = zip(source.meta["val"].shape, index.meta["val"].shape, strict=True)  # type: ignore[union-attr]
        for i, (whole, part) in enumerate(sizes):
            if i != dim and str(whole) == str(part) and axes[i] != ():
                unify(axes[i], picked[i], f"gather at %{node.name}")
        return picked

    def _scatter(self, node: fx.Node) -> Axes:
        given, index = node.args[1:3]
        axes = self._same(node)
        dim = given % len(axes)  # type: ignore[operator]
        self._chosen(axes[dim], index, node)  # type: ignore[arg-type]
        return axes

    def _index(self, node: fx.Node) -> Axes | None:
        source, given = node.args[:2]
        axes = self._same(node)
        picks = [(i, index) for i, index in enumerate(given) if index is not None]  # type: ignore[arg-type]
        places = [i for i, _ in picks]
        if not picks or places != list(range(places[0], places[-1] + 1)):
            return None
        if any(index.meta["val"].dtype == torch.bool for _, index in picks):
            return None
        for place, index in picks:
            self._chosen(axes[place], index, node)
        rank = max(index.meta["val"].dim() for _, index in picks)
        made = self._broadcast([self.of(index) for _, index in picks], Rank(rank), f"%{node.name}")  # type: ignore[arg-type]
        bank = "weight" in source.meta and len(axes) == 3  # type: ignore[union-attr]
        if bank and places == [0] and rank == 1:
            self._gathered[node] = _Gathered(source.meta["weight"], picks[0][1])  # type: ignore[union-attr]
        return [*axes[: places[0]], *made, *axes[places[-1] + 1 :]]

    def _one_hot(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        made = self._fresh(node.meta["val"])[-1]
        if node.args[0] in self.numbers and len(made):
            unify(made, self.numbers[node.args[0]], f"one_hot at %{node.name}")  # type: ignore[index]
        lock(made, f"one_hot at %{node.name} spells its size")
        return [*axes, made]

    def _bank_product(self, node: fx.Node, x: fx.Node, y: fx.Node) -> None:
        """Note a batched product of activations with matrices of a bank."""
        left, right = self._matrices(x), self._matrices(y)
        found = left if right is None else right if left is None else None
        if found is None:
            return
        activations = x if right is not None else y
        # [N, out, in] x [N, in, 1], or [N, 1, in] x [N, in, out]; transposing changes which axis of the weight is which.
        in_axis = (2 if left is not None else 1) if not found.turned else (1 if left is not None else 2)
        reader = node
        if getattr(activations.target, "overloadpacket", None) is aten.unsqueeze:
            reader, activations = activations, activations.args[0]  # type: ignore[assignment]
        elif left is not None:
            return
        self.bank_linears[node] = Linear(
            node, activations, found.weight, None, in_axis, reader, bank=True, index=found.index
        )
