"""FLOPs of one node, from the shapes in its meta data: two for every multiply-add of every product.

The convention is torch.utils.flop_counter's: products and convolutions count, everything elementwise is free, and a
causal attention counts as the full one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)

aten = torch.ops.aten
Sizes = tuple[Any, ...]


def sizes_of(value: torch.Tensor) -> Sizes:
    """The shape of a fake tensor as integers and sympy expressions."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


def node_flops(node: fx.Node) -> sympy.Expr | None:
    """FLOPs of a node in the symbols of its shapes; None when the op has no known count."""
    if node.op != "call_function":
        return sympy.Integer(0)
    packet = getattr(node.target, "overloadpacket", node.target)
    count = _PRODUCTS.get(packet)
    if count is not None:
        found = count(node)
        return None if found is None else sympy.expand(found)
    return sympy.Integer(0) if _free(node, packet) else None


def _free(node: fx.Node, packet: Any) -> bool:
    if packet in _FREE or not isinstance(node.target, torch._ops.OpOverload):
        return True
    tags = node.target.tags
    # Views move nothing; creation reads nothing; numbers (sizes) are no arithmetic on tensors.
    makes_tensor = any("Tensor" in str(result.type) for result in node.target._schema.returns)
    return torch.Tag.pointwise in tags or node.target.is_view or not makes_tensor or not _reads(node)


def _reads(node: fx.Node) -> bool:
    return any(isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes)


def _shape(argument: Any) -> Sizes:
    return sizes_of(argument.meta["val"])


def _product(sizes: Sizes) -> Any:
    result: Any = sympy.Integer(1)
    for size in sizes:
        result = result * size
    return result


def _contraction(x: int) -> Callable[[fx.Node], Any]:
    """2 x elements of the result x the last size of argument `x`: every plain or batched matrix product."""
    return lambda node: 2 * _product(sizes_of(node.meta["val"])) * _shape(node.args[x])[-1]


def _attention(node: fx.Node) -> Any:
    """Q K^T and the product with V, for every query head."""
    (b, h, s, d), (*_, t, _), (*_, e) = (_shape(node.args[i]) for i in range(3))
    return 2 * b * h * s * t * (d + e)


def _cached_attention(node: fx.Node) -> Any:
    """New queries against all slots of a cache, as if it were full."""
    (b, h, s, d), (*_, c, e) = _shape(node.args[0]), _shape(node.args[4])
    return 2 * b * h * s * c * (d + e)


def _held_attention(node: fx.Node) -> Any:
    """New queries against what is held and against each other."""
    (b, h, s, d), (*_, c, e) = _shape(node.args[0]), _shape(node.args[4])
    products = e if node.args[8] is not None else d + e
    return 2 * b * h * s * (c + s) * products


def _admitting_attention(node: fx.Node) -> Any:
    """New queries against all slots of a cache and against each other."""
    (b, h, s, d), (*_, c, e) = _shape(node.args[0]), _shape(node.args[4])
    return 2 * b * h * s * (c + s) * (d + e)


def _packed_attention(node: fx.Node) -> Any:
    """New queries against all tokens of a quantised cache, as if it were full, and against each other."""
    (b, h, s, d), (*_, e), (_, _, n, *_) = (_shape(node.args[i]) for i in (0, 2, 8))
    return 2 * b * h * s * (n * node.args[18] + s) * (d + e)


def _heavy_weights(node: fx.Node) -> Any:
    """Products of new queries with the keys that are held and with each other's."""
    (b, h, s, d), (*_, c, _) = _shape(node.args[0]), _shape(node.args[2])
    return 2 * b * h * s * (c + s) * d


def _received(node: fx.Node) -> Any:
    """Products of the queries that are asked with all keys."""
    (b, h, s, d), (*_, t, _) = _shape(node.args[0]), _shape(node.args[1])
    return 2 * b * h * s * t * d


def _merged(node: fx.Node) -> Any:
    """Every token compared with every other."""
    b, s, d = _shape(node.args[0])
    return 2 * b * s * s * d


def _convolution(node: fx.Node) -> Any:
    weight = _shape(node.args[1])
    transposed = len(node.args) > 6 and bool(node.args[6]) and node.target is aten.convolution.default
    shape = _shape(node.args[0]) if transposed else sizes_of(node.meta["val"])
    # Per position of the (transposed: input) image, one multiply-add for every weight of one group.
    positions = _product((shape[0], *shape[2:]))
    return 2 * positions * _product(weight)


def _einsum(node: fx.Node) -> Any:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[call-overload]
    inputs, _, _ = equation.partition("->")
    letters = inputs.split(",")
    if "." in equation or len(letters) != 2:
        return None
    sizes = {
        letter: size
        for word, operand in zip(letters, operands, strict=True)
        for letter, size in zip(word, _shape(operand), strict=True)
    }
    return 2 * _product(tuple(sizes.values()))


def _grouped(node: fx.Node) -> Any:
    """A grouped product multiplies every row once, by its own expert's matrix."""
    return 2 * _product(_shape(node.args[0])) * _shape(node.args[1])[-1]


_PRODUCTS: dict[Any, Callable[[fx.Node], Any]] = {
    aten.mm: _contraction(0),
    aten.bmm: _contraction(0),
    aten.matmul: _contraction(0),
    aten.linear: _contraction(0),
    aten.mv: _contraction(0),
    aten.dot: _contraction(0),
    aten.addmm: _contraction(1),
    aten.addmv: _contraction(1),
    aten.baddbmm: _contraction(1),
    aten.einsum: _einsum,
    aten.convolution: _convolution,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten._grouped_mm: _grouped,
    aten.scaled_dot_product_attention: _attention,
    torch.ops.graphopt.admitted_attention: _attention,
    torch.ops.graphopt.admitting_attention: _admitting_attention,
    torch.ops.graphopt.attention: _attention,
    torch.ops.graphopt.bounded_attention: _attention,
    torch.ops.graphopt.cached_attention: _cached_attention,
    torch.ops.graphopt.held_attention: _held_attention,
    torch.ops.graphopt.packed_attention: _packed_attention,
    torch.ops.graphopt.quantised_attention: _attention,
    torch.ops.graphopt.heavy_weights: _heavy_weights,
    torch.ops.graphopt.received_attention: _received,
    torch.ops.graphopt.merge_tokens: _merged,
    torch.ops.graphopt.pair_scores: _merged,
}

_FREE = {
    operator.getitem,
    aten._softmax,
    aten._to_copy,
    aten._unsafe_view,
    aten.all,
    aten.amax,
    aten.amin,
    aten.any,
    aten.argmax,
    aten.argsort,
    aten.bincount,
    aten.cat,
    aten.clone,
    aten.constant_pad_nd,
    aten.contiguous,
    aten.count_nonzero,
    aten.cummax,
    aten.cumsum,
    aten.dropout,
    aten.embedding,
    aten.expand_as,
    aten.flatten,
    aten.full_like,
    aten.new_ones,
    aten.new_zeros,
    aten.gather,
    aten.group_norm,
    aten.histc,
    aten.index,
    aten.index_add,
    aten.index_copy,
    aten.index_put,
    aten.index_select,
    aten.layer_norm,
    aten.log_softmax,
    aten.masked_fill,
    aten.masked_scatter,
    aten.max,
    aten.mean,
    aten.min,
    aten.native_layer_norm,
    aten.new_empty,
    aten.nonzero,
    aten.norm,
    aten.one_hot,
    aten.ones_like,
    aten.pad,
    aten.prod,
    aten.repeat,
    aten.repeat_interleave,
    aten.reshape,
    aten.rms_norm,
    aten.roll,
    aten.rsub,
    aten.scatter,
    aten.scatter_add,
    aten.searchsorted,
    aten.slice_scatter,
    aten.softmax,
    aten.sort,
    aten.split,
    aten.split_with_sizes,
    aten.stack,
    aten.std,
    aten.sum,
    aten.to,
    aten.topk,
    aten.tril,
    aten.triu,
    aten.type_as,
    aten.unflatten,
    aten.unique_consecutive,
    aten.var,
    aten.where,
    aten.zeros_like,
    torch.ops.graphopt.attention_mask,
    torch.ops.graphopt.dequantise,
    torch.ops.graphopt.from_palette,
    torch.ops.graphopt.from_sparse,
    torch.ops.graphopt.rms_norm,
    torch.ops.graphopt.rotary,
    torch.ops.graphopt.put_tokens,
    torch.ops.graphopt.random_scores,
    torch.ops.graphopt.similarity_scores,
    torch.ops.graphopt.take_tokens,
    torch.ops.graphopt.token_index,
    torch.ops.graphopt.admit_tokens,
    torch.ops.graphopt.top_tokens,
    torch.ops.graphopt.merge_windows,
    torch.ops.graphopt.window_scores,
}
