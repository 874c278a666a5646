"""Rebuilding what a graph computes from places in the sequence, for new tokens in rows and cache entries in columns.

A stateless graph counts places itself (arange over the sequence, a cumulative sum of the padding) and may build biases
`[.., S, S]` from them. With a cache rows stand at the positions that the caller gives, and columns at every place that
the cache can hold. The expressions are copied with that meaning: all rows of a batch side by side on one axis of B * S,
columns on one of C, so that every copy keeps its rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.rewriter import Rewriter
from graphopt.passes.cache.sequence import Sequence, expression, is_tensors, packet, tensors_in

aten = torch.ops.aten
ROW, COLUMN = "row", "column"
Roles = tuple[str | None, ...]

_COPIES = {
    aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.zeros_like, aten.ones_like, aten.full_like, aten.detach,
    aten.alias, aten.rsub, aten.where, aten.masked_fill, aten.__and__, aten.__or__,
    aten.floor_divide,
}  # fmt: skip
_SIZED = {aten.view, aten.reshape, aten._unsafe_view, aten.expand}
_MADE = {aten.full: 0, aten.zeros: 0, aten.ones: 0}


class Unplaceable(Exception):
    """An expression of places that has no proven meaning with a cache: `node` and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"%{node.name} {reason}")
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class Frame:
    """Today's nodes that give rows and columns their places: `[B, S]` positions, and the capacity C as a number."""

    positions: fx.Node
    batch: fx.Node
    length: fx.Node
    capacity: fx.Node
    rows: fx.Node


class Places:
    """Copies expressions of places into a graph under change; equal requests share their copies."""

    def __init__(self, rewriter: Rewriter, sequence: Sequence, frame: Frame, after: fx.Node) -> None:
        self.rewriter, self.sequence, self.frame = rewriter, sequence, frame
        self.last = after
        self._made: dict[tuple[fx.Node, Roles], fx.Node] = {}
        self._base: dict[str, fx.Node] = {}

    def mask(self, node: fx.Node) -> fx.Node:
        """A mask or bias `[B or 1, 1 or H, S, T]` as `[B, 1 or H, S, C]`, columns by position."""
        rank = node.meta["val"].dim()
        axes = self.sequence.axes(node)
        if rank != 4 or not set(axes) <= {2, 3}:
            raise Unplaceable(node, f"is a mask with {rank} axes of which {len(axes)} follow the sequence")
        roles = tuple({2: ROW, 3: COLUMN}.get(i) if i in axes else None for i in range(rank))
        made = self._build(node, roles)
        if 2 not in axes:
            return made
        heads = node.meta["val"].shape[1]
        last = self.frame.capacity if 3 in axes else node.meta["val"].shape[3]
        if heads == 1:
            return self._call(aten.reshape.default, made, [self.frame.batch, 1, self.frame.length, last])
        split = self._call(aten.reshape.default, made, [heads, self.frame.batch, self.frame.length, last])
        return self._call(aten.transpose.int, split, 0, 1)

    def rows(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """What `reader` (tokens pass through it) reads of `node`, at the places of the new tokens."""
        axes = self.sequence.axes(node)
        value = node.meta["val"]
        if len(axes) != 1:
            raise Unplaceable(node, f"has {len(axes)} axes that follow the sequence and meets tokens at %{reader.name}")
        axis = axes[0]
        sizes = [expression(size) for size in value.shape]
        made = self._build(node, tuple(ROW if i == axis else None for i in range(value.dim())))
        if self.sequence.batch in sizes[axis].free_symbols:
            return made
        batch = next((i for i, size in enumerate(sizes) if self.sequence.batch in size.free_symbols), None)
        if batch is None and packet(reader) is torch.ops.graphopt.take_tokens:
            batch = 0
        elif batch is None:
            batch = axis - self._distance(node, axis, reader)
        if batch == axis:
            return made
        return self._spread(node, made, axis, batch)

    def _distance(self, node: fx.Node, axis: int, reader: fx.Node) -> int:
        """How far left of the sequence the batch lies where `reader` broadcasts `node`."""
        result = reader.meta["val"]
        sizes = [expression(size) for size in result.shape]
        lengths = [i for i, size in enumerate(sizes) if self.sequence.length in size.free_symbols]
        batches = [i for i, size in enumerate(sizes) if self.sequence.batch in size.free_symbols]
        if len(lengths) != 1 or len(batches) != 1 or result.dim() - lengths[0] != node.meta["val"].dim() - axis:
            raise Unplaceable(node, f"meets tokens at %{reader.name} in a way that is not a broadcast")
        return lengths[0] - batches[0]

    def _spread(self, node: fx.Node, made: fx.Node, axis: int, batch: int) -> fx.Node:
        """From one axis of B * S to a batch axis and an axis of S."""
        sizes: list[Any] = [self._plain(size, node) if i != axis else None for i, size in enumerate(_sizes(node))]
        while batch < 0:
            sizes, axis, batch = [1, *sizes], axis + 1, batch + 1
        if any(size != 1 for size in sizes[batch:axis]):
            lead, between, rest = sizes[:batch], sizes[batch:axis], sizes[axis + 1 :]
            if between[0] != 1:
                raise Unplaceable(node, "has no free axis for the batch")
            split = [*lead, *between, self.frame.batch, self.frame.length, *rest]
            wide = self._call(aten.reshape.default, made, split)
            order = list(range(len(split)))
            order.remove(axis)
            order[batch] = axis
            return self._call(aten.permute.default, wide, [*order])
        shape = [*sizes[:batch], self.frame.batch, *sizes[batch + 1 : axis], self.frame.length, *sizes[axis + 1 :]]
        return self._call(aten.reshape.default, made, shape)

    def native(self, node: fx.Node) -> bool:
        """Whether an expression keeps its meaning as it stands, once padding is ones and its count the positions."""
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if self.sequence.role(current) in ("padding", "positions") or self._counts(current):
                continue
            if packet(current) in (aten.arange, torch.ops.graphopt.attention_mask) and self.sequence.axes(current):
                return False
            if packet(current) in (aten.slice, aten.cumsum) and self.sequence.axes(current):
                return False
            for source in current.all_input_nodes:
                if source not in seen and is_tensors(source) and source.op in ("call_function", "placeholder"):
                    seen.add(source)
                    stack.append(source)
        return True

    def _counts(self, node: fx.Node) -> bool:
        """Whether a node counts real tokens: the cumulative sum of the padding."""
        if packet(node) is not aten.cumsum or not self.sequence.is_padding(node.args[0]):  # type: ignore[arg-type]
            return False
        axes = self.sequence.axes(node)
        return axes == (node.args[1] % node.meta["val"].dim(),)  # type: ignore[operator]

    def native_count(self, node: fx.Node) -> bool:
        """Whether a node is a count of real tokens `[B, S]`, which the positions replace."""
        return self._counts(node) and node.meta["val"].dim() == 2

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.rewriter.call(target, *args, after=self.last)
        made.kwargs = kwargs
        self.last = made
        return made

    def _at(self, role: str) -> fx.Node:
        """Places of an axis: positions of all rows `[B * S]`, or every place of the cache `[C]`."""
        if role not in self._base:
            if role == ROW:
                self._base[role] = self._call(aten.reshape.default, self.frame.positions, [self.frame.rows])
            else:
                cpu = torch.device("cpu")
                self._base[role] = self._call(
                    aten.arange.default, self.frame.capacity, dtype=torch.int64, device=cpu, pin_memory=False
                )
        return self._base[role]

    def _count(self, role: str | None, size: Any, node: fx.Node) -> Any:
        if role == ROW:
            return self.frame.rows
        return self.frame.capacity if role == COLUMN else self._plain(size, node)

    def _plain(self, size: Any, node: fx.Node) -> int:
        """A size that does not follow the sequence, for a batch of one."""
        found = expression(size).subs(self.sequence.batch, 1)
        if not found.is_Integer:
            raise Unplaceable(node, f"has a size {found} that is not known")
        return int(found)

    def _build(self, node: fx.Node, roles: Roles) -> fx.Node:
        key = (node, roles)
        if key not in self._made:
            self._made[key] = self._make(node, roles)
        return self._made[key]

    def _make(self, node: fx.Node, roles: Roles) -> fx.Node:
        if node.op == "placeholder":
            return self._input(node, roles)
        kind = packet(node)
        if kind is aten.arange and any(roles):
            return self._arange(node, roles[0])
        if self._counts(node):
            place = self._at(_only(roles, node))
            made = self._call(aten.add.Tensor, place, 1)
            return self._call(aten.reshape.default, made, [self._count(r, 1, node) for r in roles])
        if kind is torch.ops.graphopt.attention_mask:
            return self._visibility(node)
        if kind in _SIZED:
            return self._sized(node, roles)
        if kind in _MADE:
            sizes = [self._count(r, s, node) for r, s in zip(roles, _sizes(node), strict=True)]
            return self._call(node.target, sizes, *node.args[1:], **node.kwargs)
        rule = _RULES.get(kind)
        if rule is not None:
            return rule(self, node, roles)
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if not any(roles) or pointwise or kind in _COPIES:
            return self._broadcast(node, roles)
        raise Unplaceable(node, f"({node.target}) has no rule for places")

    def _input(self, node: fx.Node, roles: Roles) -> fx.Node:
        role = self.sequence.role(node)
        if role is None or not any(roles):
            if role in ("padding", "positions"):
                raise Unplaceable(node, "is read in a way that is not known")
            return self.rewriter.node(node)
        if role == "padding":
            sizes = [self._count(r, 1, node) for r in roles]
            device = torch.device("cpu")
            return self._call(aten.full.default, sizes, 1, dtype=node.meta["val"].dtype, device=device)
        if role != "positions":
            raise Unplaceable(node, f"({role}) follows the sequence and is neither padding nor positions")
        sizes = [self._count(r, 1, node) for r in roles]
        return self._call(aten.reshape.default, self._at(_only(roles, node)), sizes)

    def _arange(self, node: fx.Node, role: str | None) -> fx.Node:
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        start, step = given.get("start", 0), given.get("step", 1)
        if not isinstance(start, int | float) or not isinstance(step, int | float) or role is None:
            raise Unplaceable(node, "counts places from a computed start")
        if sympy.simplify(_sizes(node)[0] - self.sequence.length) != 0:
            raise Unplaceable(node, f"counts {_sizes(node)[0]} places, not one for each token")
        made = self._at(role)
        if step != 1:
            made = self._call(aten.mul.Tensor, made, step)
        if start != 0:
            made = self._call(aten.add.Tensor, made, start)
        dtype = node.meta["val"].dtype
        return made if dtype == torch.int64 else self._call(aten.to.dtype, made, dtype)

    def _visibility(self, node: fx.Node) -> fx.Node:
        """Causality and window by places `[1, 1, B * S, C]`; padding has no place in a cache."""
        _, _, _, _, causal, window = node.args
        if not causal:
            raise Unplaceable(node, "lets tokens see those after them")
        row = self._call(aten.reshape.default, self._at(ROW), [1, 1, self.frame.rows, 1])
        column = self._call(aten.reshape.default, self._at(COLUMN), [1, 1, 1, self.frame.capacity])
        made = self._call(aten.le.Tensor, column, row)
        if window is None:
            return made
        first = self._call(aten.sub.Tensor, row, window)
        return self._call(aten.logical_and.default, made, self._call(aten.gt.Tensor, column, first))

    def _sized(self, node: fx.Node, roles: Roles) -> fx.Node:
        """Views and expansions: sizes are written anew, and the axes of the source follow in their order."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        inner = self.sequence.axes(source)
        rank = source.meta["val"].dim()
        if packet(node) is aten.expand:
            shift = len(roles) - rank
            of_source = tuple(roles[i + shift] if i in inner else None for i in range(rank))
        else:
            named = [role for role in roles if role is not None]
            if len(named) != len(inner):
                raise Unplaceable(node, "merges or splits the sequence")
            given = iter(named)
            of_source = tuple(next(given) if i in inner else None for i in range(rank))
        made = self._build(source, of_source)
        sizes = [self._count(r, s, node) for r, s in zip(roles, _sizes(node), strict=True)]
        return self._call(node.target, made, sizes)

    def _broadcast(self, node: fx.Node, roles: Roles) -> fx.Node:
        """Elementwise: axes of each operand are aligned from the right."""

        def operand(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if not isinstance(value.meta["val"], torch.Tensor):
                return self._plain(value.meta["val"], node) if not is_tensors(value) else self._build(value, roles)
            return self._build(value, self._aligned(value, roles))

        args = fx.node.map_aggregate(node.args, operand)
        kwargs = fx.node.map_aggregate(node.kwargs, operand)
        return self._call(node.target, *args, **kwargs)  # type: ignore[misc]

    def _aligned(self, value: fx.Node, roles: Roles) -> Roles:
        rank, axes = value.meta["val"].dim(), self.sequence.axes(value)
        shift = len(roles) - rank
        return tuple(roles[i + shift] if i in axes and i + shift >= 0 else None for i in range(rank))

    def _with(self, node: fx.Node, roles: Roles) -> fx.Node:
        """The same call on its first operand under other axes."""
        made = self._build(node.args[0], roles)  # type: ignore[arg-type]
        if any(tensors_in(node)[1:]):
            raise Unplaceable(node, "reads several tensors of places")
        return self._call(node.target, made, *node.args[1:], **node.kwargs)


def _sizes(node: fx.Node) -> list[sympy.Expr]:
    return [expression(size) for size in node.meta["val"].shape]


def _only(roles: Roles, node: fx.Node) -> str:
    named = [role for role in roles if role is not None]
    if len(named) != 1:
        raise Unplaceable(node, "is read along two axes at once")
    return named[0]


def _unsqueeze(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    axis = node.args[1] % len(roles)  # type: ignore[operator]
    return places._with(node, roles[:axis] + roles[axis + 1 :])


def _removed(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """`select` and `squeeze` at an axis that does not follow the sequence."""
    if len(node.args) < 2 or not isinstance(node.args[1], int):
        raise Unplaceable(node, "drops axes without naming them")
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    axis = node.args[1] % rank
    if axis in places.sequence.axes(node.args[0]):  # type: ignore[arg-type]
        raise Unplaceable(node, "takes one place out of the sequence")
    if rank == len(roles):
        return places._with(node, roles)
    return places._with(node, (*roles[:axis], None, *roles[axis:]))


def _swapped(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    swapped = list(roles)
    a, b = (axis % len(roles) for axis in node.args[1:3])  # type: ignore[operator]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return places._with(node, tuple(swapped))


def _permuted(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    before: list[str | None] = [None] * len(roles)
    for role, axis in zip(roles, node.args[1], strict=True):  # type: ignore[arg-type]
        before[axis] = role
    return places._with(node, tuple(before))


def _sliced(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """A slice along an axis of its own, or the first S entries of a table."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    axis = (node.args[1] if len(node.args) > 1 else 0) % len(roles)  # type: ignore[operator]
    step = node.args[4] if len(node.args) > 4 else 1
    if roles[axis] is None:
        return places._with(node, roles)
    rows = source.meta["val"].shape[axis]
    if axis in places.sequence.axes(source) or not isinstance(rows, int) or node.args[2] not in (0, None) or step != 1:
        raise Unplaceable(node, "takes a part of the sequence")
    table = places._build(source, tuple(None if i == axis else role for i, role in enumerate(roles)))
    index = places._at(roles[axis] or ROW)
    if roles[axis] == COLUMN:
        # Capacity may exceed the table; no token ever stands at those places.
        index = places._call(aten.clamp.default, index, None, rows - 1)
    return places._call(aten.index_select.default, table, axis, index)


def _embedded(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    table = places._build(node.args[0], (None, None))  # type: ignore[arg-type]
    index = places._build(node.args[1], roles[:-1])  # type: ignore[arg-type]
    return places._call(node.target, table, index, *node.args[2:], **node.kwargs)


def _indexed(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """Lines of a table `[N, ..]` that one index names, as an embedding has them."""
    table, indices = node.args[:2]
    if places.sequence.axes(table) or len(indices) != 1 or indices[0] is None:  # type: ignore[arg-type]
        raise Unplaceable(node, "picks by more than one index")
    index: fx.Node = indices[0]  # type: ignore[index,assignment]
    made = places._build(table, (None,) * table.meta["val"].dim())  # type: ignore[arg-type,union-attr]
    return places._call(node.target, made, [places._build(index, roles[: index.meta["val"].dim()])])


def _joined(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    axis = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(roles)  # type: ignore[operator]
    if roles[axis] is not None:
        raise Unplaceable(node, "joins places along the sequence")
    inner = roles if packet(node) is aten.cat else roles[:axis] + roles[axis + 1 :]
    pieces = [
        places._build(piece, tuple(r if i in places.sequence.axes(piece) else None for i, r in enumerate(inner)))
        for piece in node.args[0]  # type: ignore[union-attr]
    ]
    return places._call(node.target, pieces, *node.args[1:], **node.kwargs)


def _repeated(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """`repeat_interleave` and `repeat` along axes that do not follow the sequence."""
    if packet(node) is aten.repeat:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        shift = len(roles) - source.meta["val"].dim()
        counts = [c.meta["val"] if isinstance(c, fx.Node) else c for c in node.args[1]]  # type: ignore[union-attr]
        plain = [places._plain(count, node) for count in counts]
        if any(role is not None and count != 1 for role, count in zip(roles, plain, strict=True)):
            raise Unplaceable(node, "repeats the sequence")
        return places._call(node.target, places._build(source, roles[shift:]), plain)
    if len(node.args) < 3 or roles[node.args[2]] is not None:  # type: ignore[call-overload]
        raise Unplaceable(node, "repeats the sequence")
    return places._with(node, roles)


def _product(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """A matrix product whose contraction does not follow the sequence."""
    a, b = node.args[:2]
    rank = len(roles)
    if a.meta["val"].dim() != rank or b.meta["val"].dim() != rank:  # type: ignore[union-attr]
        raise Unplaceable(node, "multiplies tensors of different rank")
    sides = []
    for side, own in ((a, (*roles[:-1], None)), (b, (*roles[:-2], None, roles[-1]))):
        axes = places.sequence.axes(side)  # type: ignore[arg-type]
        sides.append(places._build(side, tuple(r if i in axes else None for i, r in enumerate(own))))  # type: ignore[arg-type]
    return places._call(node.target, *sides)


def _element(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    """One of several results."""
    return places._call(node.target, places._build(node.args[0], roles), node.args[1])  # type: ignore[arg-type]


def _divided(places: Places, node: fx.Node, roles: Roles) -> fx.Node:
    axis = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(roles)  # type: ignore[operator]
    if roles[axis] is not None:
        raise Unplaceable(node, "splits the sequence")
    return places._with(node, roles)


_RULES: dict[Any, Callable[[Places, fx.Node, Roles], fx.Node]] = {
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _removed,
    aten.select: _removed,
    aten.transpose: _swapped,
    aten.permute: _permuted,
    aten.slice: _sliced,
    aten.embedding: _embedded,
    aten.index: _indexed,
    aten.cat: _joined,
    aten.stack: _joined,
    aten.repeat: _repeated,
    aten.repeat_interleave: _repeated,
    aten.matmul: _product,
    aten.bmm: _product,
    aten.split: _divided,
    aten.chunk: _divided,
    aten.split_with_sizes: _divided,
    operator.getitem: _element,
}
