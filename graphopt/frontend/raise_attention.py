"""Raise attention that a model spells out (products around a softmax) to `graphopt::attention`.

Walks from the product with the values inwards: softmax, masks and biases, soft cap, scale, the product of queries and
keys, and head repetition. What does not fit stays as it is; labels still find its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.frontend.matching import is_op, through

aten = torch.ops.aten
_HIDDEN = -1e4


@dataclass
class _Scores:
    """What was found between the softmax and the product of queries and keys."""

    q: fx.Node
    k: fx.Node
    scale: float = 1.0
    softcap: float | None = None
    biases: list[fx.Node] = field(default_factory=list)
    visible: list[tuple[fx.Node, bool]] = field(default_factory=list)
    view: fx.Node | None = None
    # What scales the scores of each query or head: a tensor with one entry in place of the keys.
    gains: list[fx.Node] = field(default_factory=list)


def raise_spelled_attention(graph: fx.Graph) -> None:
    """Raise every spelled-out attention of a graph in place."""
    for node in list(graph.nodes):
        if is_op(node, aten.matmul, aten.bmm):
            found = _match(node)
            if found is not None:
                _emit(graph, node, found)


def _match(product: fx.Node) -> _Scores | None:
    probabilities = through(product.args[0], aten.to, aten.view, aten.reshape, aten.expand, aten.clone)
    if is_op(probabilities, aten.masked_fill) and _number(probabilities.args[2]) == 0.0:
        # Rows that see no key give nothing, which is what the op does with a mask of truth.
        probabilities = probabilities.args[0]
    if not is_op(probabilities, aten.softmax, aten._softmax):
        return None
    rank = probabilities.meta["val"].dim()
    if probabilities.args[1] not in (-1, rank - 1):
        return None
    return _logits(probabilities.args[0])


def _logits(node: Any) -> _Scores | None:
    """Undo what was done to the scores, outermost first."""
    outer_scale = 1.0
    softcap: float | None = None
    biases: list[fx.Node] = []
    visible: list[tuple[fx.Node, bool]] = []
    gains: list[fx.Node] = []
    view: fx.Node | None = None
    while isinstance(node, fx.Node):
        if is_op(node, aten.to, aten.clone) or _changes_nothing(node):
            node = node.args[0]
        elif is_op(node, aten.view, aten.reshape) and _folds_heads(node):
            # Masks are added to [B, H, S, T] between products of [B * H, S, T]: there and back is common.
            view = node if node.meta["val"].dim() == 4 else view
            node = node.args[0]
        elif is_op(node, aten.mul, aten.div) and _number(node.args[1]) is not None:
            factor = _number(node.args[1]) or 0.0
            factor = factor if is_op(node, aten.mul) else 1.0 / factor
            inner = through(node.args[0], aten.to)
            if is_op(inner, aten.tanh) and outer_scale == 1.0:
                softcap, node = factor, inner.args[0]
                if not is_op(node, aten.div, aten.mul):
                    return None
                shrink = _number(node.args[1])
                shrink = None if shrink is None else shrink if is_op(node, aten.div) else 1.0 / shrink
                if shrink is None or abs(shrink - softcap) > 1e-6 * softcap:
                    return None
            else:
                outer_scale *= factor
            node = node.args[0]
        elif is_op(node, aten.mul) and softcap is None and (gain := _gain(node)) is not None:
            gains.append(gain)
            node = node.args[0]
        elif is_op(node, aten.add) and outer_scale == 1.0 and not gains and (kept := _kept(node)) is not None:
            visible.append((kept[1], True))
            node = kept[0]
        elif is_op(node, aten.add) and len(node.args) == 2 and softcap is None:
            sides = [a for a in node.args if isinstance(a, fx.Node)]
            inner = [side for side in sides if _holds_scores(side)]
            if len(sides) != 2 or len(inner) != 1:
                return None
            bias = next(side for side in sides if side is not inner[0])
            # A scale outside of the sum changes what a bias adds, but hides what a mask hides all the same.
            if (outer_scale != 1.0 or gains) and visibility(bias) is None:
                return None
            biases.append(bias)
            node = inner[0]
        elif is_op(node, aten.masked_fill) and outer_scale == 1.0 and (_number(node.args[2]) or 0) < _HIDDEN:
            visible.append((node.args[1], False))
            node = node.args[0]
        elif is_op(node, aten.where) and outer_scale == 1.0 and (_number(node.args[2]) or 0) < _HIDDEN:
            visible.append((node.args[0], True))
            node = node.args[1]
        elif is_op(node, aten.matmul, aten.bmm):
            q, k = node.args
            return _Scores(q, k, outer_scale, softcap, biases, visible, view, gains)
        elif is_op(node, aten.baddbmm):
            beta, alpha = float(node.kwargs.get("beta", 1.0)), float(node.kwargs.get("alpha", 1.0))
            if beta != 1.0 or outer_scale != 1.0 or gains:
                return None
            bias, q, k = node.args[:3]
            return _Scores(q, k, alpha, softcap, [*biases, bias], visible, view)
        else:
            return None
    return None


def _changes_nothing(node: fx.Node) -> bool:
    """Whether scores pass as they are: 0 added, or raised to the lowest number that a dtype has."""
    if is_op(node, aten.add):
        return len(node.args) == 2 and _number(node.args[1]) == 0.0
    if is_op(node, aten.max, aten.maximum, aten.clamp_min) and len(node.args) == 2:
        low = _number(node.args[1])
        return low is not None and low < _HIDDEN
    return False


def _gain(node: fx.Node) -> fx.Node | None:
    """The factor of scores that is the same for all keys."""
    first, second = node.args
    if not isinstance(second, fx.Node) or not _holds_scores(first):
        return None
    shape, scores = second.meta["val"].shape, node.meta["val"].shape
    fits = len(shape) <= len(scores) and bool(shape) and isinstance(shape[-1], int) and shape[-1] == 1
    return second if fits and second.meta["val"].dtype == node.meta["val"].dtype else None


def _kept(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Scores s and a mask m of ones and zeros behind `s * m + (1 - m) * low`, or None."""
    sides = [a for a in node.args if is_op(a, aten.mul)]
    if len(sides) != 2:
        return None
    for scored, hidden in (sides, reversed(sides)):
        scores, mask = scored.args  # type: ignore[union-attr]
        rest, low = hidden.args  # type: ignore[union-attr]
        if not is_op(rest, aten.rsub) or rest.args[0] is not mask or (_number(low) or 0) > _HIDDEN:  # type: ignore[union-attr]
            continue
        table = through(mask, aten.slice, aten.to)
        table = table.meta.get("constant") if isinstance(table, fx.Node) else None
        if table is not None and bool(((table == 0) | (table == 1)).all()) and _number(rest.args[1]) == 1.0:  # type: ignore[union-attr]
            return scores, mask
    return None


def _folds_heads(node: fx.Node) -> bool:
    """Whether a reshape leaves queries and keys alone."""
    before, after = (n.meta["val"].shape for n in (node.args[0], node))  # type: ignore[union-attr]
    return {len(before), len(after)} <= {3, 4} and list(before[-2:]) == list(after[-2:])


def _holds_scores(node: fx.Node) -> bool:
    """Whether a product of two activations lies behind a chain of scalings, casts and masks."""
    while isinstance(node, fx.Node):
        if is_op(node, aten.matmul, aten.bmm, aten.baddbmm):
            second = node.args[2 if is_op(node, aten.baddbmm) else 1]
            return isinstance(second, fx.Node) and "weight" not in second.meta
        if is_op(node, aten.to, aten.mul, aten.div, aten.view, aten.reshape, aten.masked_fill, aten.clone, aten.tanh):
            node = node.args[0]  # type: ignore[assignment]
        elif is_op(node, aten.add):
            return any(isinstance(a, fx.Node) and _holds_scores(a) for a in node.args)
        elif is_op(node, aten.where):
            node = node.args[1]  # type: ignore[assignment]
        else:
            return False
    return False


def _number(value: Any) -> float | None:
    """A Python number, or the value of a constant tensor of one element."""
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node):
        value = through(value, aten.to, aten.clone, aten.alias)
        constant = value.meta.get("constant")
        if constant is not None and constant.numel() == 1:
            return float(constant.item())
        if is_op(value, aten.full, aten.scalar_tensor, aten.full_like):
            number = value.args[-1] if is_op(value, aten.full, aten.full_like) else value.args[0]
            return float(number) if isinstance(number, int | float) else None
    return None


def _emit(graph: fx.Graph, product: fx.Node, found: _Scores) -> None:
    q, k, v = found.q, found.k, product.args[1]
    if not isinstance(v, fx.Node) or not isinstance(k, fx.Node) or q.meta["val"].dim() not in (3, 4):
        return
    if q.meta["val"].dim() == 3 and found.gains:
        return
    rank = q.meta["val"].dim()
    whole = found.view if found.view is not None else _unfolded(q)
    if rank == 3 and (whole is None or whole.meta["val"].dim() != 4):
        return

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        with_values = fx.node.map_arg(args, lambda n: n.meta["val"])
        made.meta = {**product.meta, "val": target(*with_values)}
        return made

    with graph.inserting_before(product):
        keys = _untranspose(k, call)
        if rank == 3:
            # The view is of the scores, which are to go: its sizes are read from its arguments.
            batch, heads = found.view.args[1][:2] if found.view is not None else _leading(whole, call)  # type: ignore[union-attr,index,misc]
            q, keys, v = (x if x.meta["val"].dim() == 4 else _four(x, batch, heads, call) for x in (q, keys, v))
        elif heads_repeated(keys) is not None and heads_repeated(v) is not None:
            keys, v = heads_repeated(keys), heads_repeated(v)
        mask: fx.Node | None = None
        for shown, positive in found.visible:
            shown = shown if shown.meta["val"].dtype == torch.bool else call(aten.to.dtype, shown, torch.bool)
            part = shown if positive else call(aten.logical_not.default, shown)
            mask = part if mask is None else call(aten.logical_and.default, mask, part)
        for bias in found.biases:
            if is_op(bias, aten.zeros):
                continue
            if rank == 3 and bias.meta["val"].dim() == 3:
                bias = _four(bias, batch, heads, call)
            for _ in range(bias.meta["val"].dim(), 4):
                bias = call(aten.unsqueeze.default, bias, 0)
            shown = visibility(bias)
            if shown is not None and mask is None:
                mask = shown
            elif mask is None:
                mask = bias
            else:
                mask = call(aten.add.Tensor, _additive(mask, q, call), _additive(bias, q, call))
        if mask is not None and mask.meta["val"].dim() != 4:
            return
        for gain in found.gains:
            q = call(aten.mul.Tensor, q, gain)
        result = call(
            torch.ops.graphopt.attention.default,
            q, keys, v, mask, None, found.scale, False, None, found.softcap,
        )  # fmt: skip
        if product.meta["val"].dim() == 3:
            sizes = [_size(graph, product, i, call) for i in range(3)]
            result = call(aten.reshape.default, result, sizes)
    product.replace_all_uses_with(result)
    graph.erase_node(product)


def _size(graph: fx.Graph, node: fx.Node, axis: int, call: Callable[..., fx.Node]) -> Any:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node.args[0 if axis < 2 else 1], axis)


def _unfolded(q: fx.Node) -> fx.Node | None:
    """The queries [B, H, S, D] behind scaled ones of [B * H, S, D]."""
    while is_op(q, aten.mul, aten.div, aten.to, aten.clone, aten.contiguous) and isinstance(q.args[0], fx.Node):
        q = q.args[0]
    if not is_op(q, aten.view, aten.reshape) or not _folds_heads(q):
        return None
    return q.args[0] if q.args[0].meta["val"].dim() == 4 else None  # type: ignore[union-attr,return-value]


def _leading(x: fx.Node | None, call: Callable[..., fx.Node]) -> list[Any]:
    """The first two sizes of a tensor."""
    sizes = x.meta["val"].shape[:2]  # type: ignore[union-attr]
    return [size if isinstance(size, int) else call(aten.sym_size.int, x, axis) for axis, size in enumerate(sizes)]


def _four(x: fx.Node, batch: Any, heads: Any, call: Callable[..., fx.Node]) -> fx.Node:
    """[B * H, S, D] as [B, H, S, D]."""
    shape = x.meta["val"].shape
    sizes = [s if isinstance(s, int) else call(aten.sym_size.int, x, i) for i, s in enumerate(shape)]
    return call(aten.reshape.default, x, [batch, heads, sizes[1], sizes[2]])


def _untranspose(k: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
    rank = k.meta["val"].dim()
    if is_op(k, aten.transpose) and {a % rank for a in k.args[1:3]} == {rank - 1, rank - 2}:  # type: ignore[operator]
        return k.args[0]  # type: ignore[return-value]
    return call(aten.transpose.int, k, -1, -2)


def heads_repeated(x: Any) -> Any:
    """The tensor whose heads `expand` and `reshape` repeat ([B, K, T, D] to [B, K * G, T, D]), or None."""
    if not is_op(x, aten.reshape, aten.view, aten._unsafe_view):
        return None
    wide = through(x.args[0], aten.clone, aten.contiguous)
    if not is_op(wide, aten.expand):
        return None
    narrow = wide.args[0]
    if not is_op(narrow, aten.unsqueeze) or narrow.args[1] != 2 or wide.meta["val"].dim() != 5:
        return None
    return narrow.args[0]


def visibility(bias: Any) -> fx.Node | None:
    """The bool mask behind `where(mask, 0, lowest)`."""
    bias = through(bias, aten.to, aten.expand)
    if is_op(bias, aten.where) and _number(bias.args[1]) == 0.0 and (_number(bias.args[2]) or 0) < _HIDDEN:
        return bias.args[0]  # type: ignore[no-any-return]
    return None


def _additive(mask: fx.Node, q: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
    if mask.meta["val"].dtype != torch.bool:
        return mask
    hidden = call(aten.logical_not.default, mask)
    zeros = call(aten.zeros_like.default, hidden)
    zeros = call(aten.to.dtype, zeros, q.meta["val"].dtype)
    return call(aten.masked_fill.Scalar, zeros, hidden, torch.finfo(torch.bfloat16).min)
