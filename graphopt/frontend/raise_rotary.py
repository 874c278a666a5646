"""Raise rotary position embedding, in the ways that models spell it, to `graphopt::rotary`.

A rotation multiplies pairs of features by cos and sin. Models write it as x cos + turn(x) sin with turn made of halves or
of neighbours, as two products a half that are joined again, or as a product of complex numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.frontend.matching import is_op, through

aten = torch.ops.aten


@dataclass
class _Rotation:
    """What is turned: `cos` and `sin` `[..., R]`, or `[..., R / 2]` when `half`, one entry a pair."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    half: bool = False
    complex: bool = False


def raise_rotary(graph: fx.Graph) -> None:
    """Raise every rotation of a graph in place."""
    for node in list(graph.nodes):
        found = _match(node)
        if found is not None and _typed(node, found):
            _emit(graph, node, found)


def _match(node: fx.Node) -> _Rotation | None:
    if is_op(node, aten.add) and len(node.args) == 2 and all(is_op(a, aten.mul) for a in node.args):
        left, right = node.args
        return _turned(left, right) or _turned(right, left)  # type: ignore[arg-type]
    if is_op(node, aten.cat):
        pieces, axis = node.args[0], (node.args[1] if len(node.args) > 1 else 0)
        if len(pieces) == 2 and axis in (-1, node.meta["val"].dim() - 1):  # type: ignore[arg-type]
            return _two_products(pieces, interleaved=False)
    stacked = _neighbours_joined(node)
    if stacked is not None:
        return _two_products(stacked, interleaved=True)
    return _complex(node)


def _typed(node: fx.Node, found: _Rotation) -> bool:
    """Whether the op's result, which has the type of x, is what readers get."""
    dtype = found.x.meta["val"].dtype
    readers = [user for user in node.users if user.op == "call_function"]
    return node.meta["val"].dtype == dtype or all(
        is_op(user, aten.to) and user.meta["val"].dtype == dtype for user in readers
    )


def _turned(straight: fx.Node, turned: fx.Node) -> _Rotation | None:
    """x * cos + turn(x) * sin."""
    for turn, sin in _orders(turned):
        if is_op(turn, aten.cat):
            pieces, axis = turn.args[0], (turn.args[1] if len(turn.args) > 1 else 0)
            fits = len(pieces) == 2 and axis in (-1, turn.meta["val"].dim() - 1)  # type: ignore[arg-type]
            found = _pair(pieces[1], pieces[0], interleaved=False) if fits else None  # type: ignore[index]
            interleaved = False
        else:
            joined = _neighbours_joined(turn)
            found = _pair(joined[1], joined[0], interleaved=True) if joined is not None else None
            interleaved = True
        if found is None:
            continue
        for x, cos in _orders(straight):
            if _same(x, found) and _widths(found, cos, sin, 1):
                return _Rotation(x, cos, sin, interleaved)
    return None


def _orders(product: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    a, b = product.args[:2]
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        yield a, b
        yield b, a


def _pair(first: Any, negated: Any, interleaved: bool) -> fx.Node | None:
    """The tensor whose first parts are `first` and whose second parts, negated, are `negated`."""
    if not is_op(negated, aten.neg):
        return None
    a, b = _part(first, interleaved), _part(negated.args[0], interleaved)
    return a[0] if a is not None and b is not None and a[0] is b[0] and (a[1], b[1]) == (0, 1) else None


def _two_products(pieces: Any, interleaved: bool) -> _Rotation | None:
    """(x1 cos - x2 sin, x2 cos + x1 sin)."""
    first, second = (_uncast(piece) for piece in pieces)
    if not is_op(first, aten.sub) or not is_op(second, aten.add) or len(first.args) != 2 or len(second.args) != 2:
        return None
    if not all(is_op(a, aten.mul) for a in (*first.args, *second.args)):
        return None
    for one, cos in _orders(first.args[0]):
        for two, sin in _orders(first.args[1]):
            a, b = _part(one, interleaved), _part(two, interleaved)
            if a is None or b is None or a[0] is not b[0] or (a[1], b[1]) != (0, 1):
                continue
            wanted = {frozenset({two, cos}), frozenset({one, sin})}
            if {frozenset(p.args[:2]) for p in second.args} == wanted and _widths(a[0], cos, sin, 2):
                return _Rotation(a[0], cos, sin, interleaved, half=True)
    return None


def _uncast(piece: Any) -> Any:
    return through(piece, aten.to) if isinstance(piece, fx.Node) else None


def _complex(node: fx.Node) -> _Rotation | None:
    """view_as_real(view_as_complex(pairs of x) * turns), its pairs joined again."""
    real = _flattened(node)
    if not is_op(real, aten.view_as_real) or not is_op(real.args[0], aten.mul):
        return None
    for value, turns in _orders(real.args[0]):
        if is_op(value, aten.view_as_complex):
            x = _unflattened(value.args[0])
            if x is not None and turns.meta["val"].is_complex() and _is_half(x, turns):
                return _Rotation(x, turns, turns, interleaved=True, half=True, complex=True)
    return None


def _is_half(x: fx.Node, turns: fx.Node) -> bool:
    width = x.meta["val"].shape[-1]
    return isinstance(width, int) and turns.meta["val"].shape[-1] * 2 == width


def _widths(x: fx.Node, cos: fx.Node, sin: fx.Node, parts: int) -> bool:
    width = x.meta["val"].shape[-1]
    sizes = [table.meta["val"].shape[-1] for table in (cos, sin) if table.meta["val"].dim()]
    return isinstance(width, int) and width % 2 == 0 and sizes == [width // parts] * 2


def _same(x: fx.Node, found: fx.Node) -> bool:
    """Whether two nodes hold one tensor: export may take a view of it twice."""
    if x is found:
        return True
    view = is_op(x, aten.view, aten.reshape) and is_op(found, aten.view, aten.reshape)
    return view and x.args[0] is found.args[0] and str(x.meta["val"].shape) == str(found.meta["val"].shape)


def _part(node: Any, interleaved: bool) -> tuple[fx.Node, int] | None:
    """(x, 0 or 1) for a first or second half of x, or for its even or odd features."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    last = node.meta["val"].dim() - 1
    if is_op(node, aten.slice):
        x = node.args[0]
        width = x.meta["val"].shape[-1]  # type: ignore[union-attr]
        given: list[Any] = list(node.args[1:])
        axis, start, end, step = given + [0, 0, None, 1][len(given) :]
        if not isinstance(width, int) or axis not in (-1, last) or not isinstance(start or 0, int):
            return None
        start = start or 0
        if interleaved:
            whole = end is None or (isinstance(end, int) and end >= width)
            return (x, start) if step == 2 and start in (0, 1) and whole else None  # type: ignore[return-value]
        half = width // 2
        if step != 1 or node.meta["val"].shape[-1] != half:
            return None
        return (x, 0 if start == 0 else 1) if start in (0, half, -half) else None  # type: ignore[return-value]
    if getattr(node.target, "__name__", "") == "getitem":
        made = node.args[0]
        if not interleaved and is_op(made, aten.chunk, aten.split, aten.split_with_sizes):
            axis = made.args[2] if len(made.args) > 2 else made.kwargs.get("dim", 0)  # type: ignore[union-attr]
            if axis in (-1, last) and len(made.meta["val"]) == 2:  # type: ignore[union-attr]
                return (made.args[0], node.args[1]) if _even(made) else None  # type: ignore[union-attr,return-value]
        if interleaved and is_op(made, aten.unbind):
            axis = made.args[1] if len(made.args) > 1 else made.kwargs.get("dim", 0)  # type: ignore[union-attr]
            x = _unflattened(made.args[0])  # type: ignore[union-attr]
            return (x, node.args[1]) if axis in (-1, last + 1) and x is not None else None  # type: ignore[return-value]
    if interleaved and is_op(node, aten.select) and node.args[1] in (-1, last + 1) and node.args[2] in (0, 1):
        x = _unflattened(node.args[0])
        return (x, node.args[2]) if x is not None else None  # type: ignore[return-value]
    return None


def _even(made: Any) -> bool:
    first, second = made.meta["val"]
    return bool(first.shape[-1] == second.shape[-1])


def _neighbours_joined(node: Any) -> tuple[Any, Any] | None:
    """(a, b) when the last axis of a node is a_0, b_0, a_1, b_1, ..."""
    stacked = _flattened(node)
    if not is_op(stacked, aten.stack):
        return None
    pieces, axis = stacked.args[0], (stacked.args[1] if len(stacked.args) > 1 else 0)
    if len(pieces) != 2 or axis not in (-1, stacked.meta["val"].dim() - 1):
        return None
    return pieces[0], pieces[1]


def _flattened(node: Any) -> Any:
    """The tensor whose two last axes, the last of size 2, a node joins."""
    if not is_op(node, aten.flatten, aten.view, aten.reshape, aten._unsafe_view):
        return None
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    fits = len(before) == len(after) + 1 and before[-1] == 2
    return source if fits and _text(before[:-2]) == _text(after[:-1]) else None


def _unflattened(node: Any) -> fx.Node | None:
    """The tensor whose last axis a node takes apart into pairs."""
    if not is_op(node, aten.unflatten, aten.view, aten.reshape, aten._unsafe_view):
        return None
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    fits = len(after) == len(before) + 1 and after[-1] == 2 and _text(before[:-1]) == _text(after[:-2])
    return source if fits else None


def _text(sizes: Any) -> list[str]:
    return [str(size) for size in sizes]


def _emit(graph: fx.Graph, node: fx.Node, found: _Rotation) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {**node.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
        return made

    def table(source: fx.Node, part: int) -> fx.Node:
        if found.complex:
            source = call(aten.select.int, call(aten.view_as_real.default, source), -1, part)
        if not found.half:
            return source
        if found.interleaved:
            return call(aten.repeat_interleave.self_int, source, 2, -1)
        return call(aten.cat.default, [source, source], -1)

    with graph.inserting_before(node):
        cos, sin = table(found.cos, 0), table(found.sin, 1)
        new = call(torch.ops.graphopt.rotary.default, found.x, cos, sin, found.interleaved)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
