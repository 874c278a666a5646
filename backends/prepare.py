"""Preparing graphs for lowering: which ops are taken apart, and which are kept whole for their templates."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._decomp import get_decompositions

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.ops import library, quantised

aten = torch.ops.aten


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def _softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    wide = _wide(x)
    exponentials = torch.exp(wide - torch.amax(wide, dim, keepdim=True))
    result = exponentials / torch.sum(exponentials, dim, keepdim=True)
    return result if half_to_float else result.to(x.dtype)


def _log_softmax(x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    wide = _wide(x)
    shifted = wide - torch.amax(wide, dim, keepdim=True)
    result = shifted - torch.log(torch.sum(torch.exp(shifted), dim, keepdim=True))
    return result if half_to_float else result.to(x.dtype)


def _layer_norm(
    x: torch.Tensor, shape: Sequence[Any], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    axes = list(range(x.dim() - len(shape), x.dim()))
    wide = _wide(x)
    mean = torch.mean(wide, axes, keepdim=True)
    centred = wide - mean
    scale = torch.rsqrt(torch.mean(centred * centred, axes, keepdim=True) + eps)
    result = centred * scale
    if weight is not None:
        result = result * _wide(weight)
    if bias is not None:
        result = result + _wide(bias)
    # Statistics come back in the input's dtype on a CPU and wide on a GPU.
    kept = x.dtype if x.device.type == "cpu" else wide.dtype
    return result.to(x.dtype), mean.to(kept), scale.to(kept)


def _var(
    x: torch.Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> torch.Tensor:
    wide = _wide(x)
    axes = list(dim) if dim else list(range(x.dim()))
    count: Any = 1
    for axis in axes:
        count = count * x.shape[axis]
    if x.is_complex() or isinstance(count, int) is False or count <= (1 if correction is None else correction):
        return NotImplemented
    centred = wide - torch.mean(wide, axes, keepdim=True)
    total = torch.sum(centred * centred, axes, keepdim=keepdim)
    return (total / (count - (1 if correction is None else correction))).to(x.dtype)


def _fused_rms_norm(
    x: torch.Tensor, shape: Sequence[Any], weight: torch.Tensor | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    axes = list(range(x.dim() - len(shape), x.dim()))
    wide = _wide(x)
    scale = torch.rsqrt(
        torch.mean(wide * wide, axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)
    )
    result = wide * scale
    if weight is not None:
        result = result * _wide(weight)
    return result.to(x.dtype), scale


def _split(x: torch.Tensor, size: Any, dim: int = 0) -> Any:
    sizes = size if isinstance(size, list | tuple) else None
    if sizes is None:
        whole = x.shape[dim]
        if not isinstance(whole, int) or not isinstance(size, int) or size == 0:
            return NotImplemented
        sizes = [min(size, whole - start) for start in range(0, whole, size)] or [0]
    pieces, start = [], 0
    for each in sizes:
        pieces.append(torch.narrow(x, dim, start, each))
        start += each
    return pieces


def _unbind(x: torch.Tensor, dim: int = 0) -> Any:
    count = x.shape[dim]
    return [x.select(dim, i) for i in range(count)] if isinstance(count, int) else NotImplemented


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What takes ops apart before lowering: norms, softmax and what torch spells as several pointwise ops."""
    table: dict[Any, Callable[..., Any]] = dict(
        get_decompositions(
            [
                aten.addcdiv,
                aten.addcmul,
                aten.elu,
                aten.glu,
                aten.hardsigmoid,
                aten.hardswish,
                aten.hardtanh,
                aten.leaky_relu,
                aten.mish,
                aten.native_group_norm,
                aten._native_batch_norm_legit,
                aten._native_batch_norm_legit_functional,
                aten._native_batch_norm_legit_no_training,
                aten.native_batch_norm,
                aten.rsub,
                aten.softplus,
                aten.stack,
                aten.threshold,
                aten.tril,
                aten.triu,
                aten.xlogy,
            ]
        )
    )
    table[aten._softmax.default] = _softmax
    table[aten._log_softmax.default] = _log_softmax
    table[aten.native_layer_norm.default] = _layer_norm
    table[aten._fused_rms_norm.default] = _fused_rms_norm
    table[aten.var.correction] = _var
    table[aten.split.Tensor] = table[aten.split_with_sizes.default] = _split
    table[aten.unbind.int] = _unbind
    table[torch.ops.graphopt.rms_norm.default] = library._rms_norm
    table[torch.ops.graphopt.rotary.default] = library._rotary
    return table


@cache
def references() -> dict[Any, Callable[..., Any]]:
    """Our ops as what they compute, for a compiler that fuses that itself and asks a call for the layout it was told."""
    ops = torch.ops.graphopt
    return {
        ops.attention.default: library.scaled_attention,
        ops.dequantise.default: quantised._dequantise,
        ops.from_palette.default: quantised._from_palette,
        ops.from_sparse.default: quantised._from_sparse,
        ops.rms_norm.default: library._rms_norm,
        ops.rotary.default: library._rotary,
    }


def share_factors(graph: fx.Graph) -> None:
    """Turn batched products whose right factor is one matrix for the whole batch into plain ones, in place.

    That is how torch spells a linear layer whose input is laid out by heads, the only row of a step of decoding included.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.bmm.default:
            continue
        left, right = node.args
        matrix = right
        while matrix.target in (aten.view.default, aten._unsafe_view.default):
            matrix = matrix.args[0]
        if matrix.target is not aten.expand.default or matrix.args[0].meta["val"].dim() != 2:
            continue
        matrix = matrix.args[0]
        batch, rows, inner = left.meta["val"].shape
        width = right.meta["val"].shape[2]
        if not _known(inner, width) or matrix.meta["val"].shape != (inner, width):
            continue
        with graph.inserting_before(node):
            sizes = [_size(graph, left, 0, batch), _size(graph, left, 1, rows)]
            flat = _call(graph, aten.reshape.default, left, [-1, inner])
            made = _call(graph, aten.mm.default, flat, matrix)
            whole = _call(graph, aten.view.default, made, [*sizes, width])
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _known(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _size(graph: fx.Graph, node: fx.Node, axis: int, size: Any) -> Any:
    return size if isinstance(size, int) else _call(graph, aten.sym_size.int, node, axis)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call with the fake value that it gives."""
    made = graph.call_function(target, args)
    made.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return made


def raise_sdpa(graph: fx.GraphModule) -> None:
    """Turn Dynamo's calls of scaled_dot_product_attention without dropout into `graphopt::attention`, in place."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
            continue
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = (_example(given[name]) for name in names[:3])
        mask = None if given.get("attn_mask") is None else _example(given["attn_mask"])
        if q is None or k is None or v is None or q.dim() != 4 or not q.is_floating_point():
            continue
        if given.get("dropout_p", 0.0) != 0.0 or not isinstance(given.get("is_causal", False), bool):
            continue
        if given.get("attn_mask") is not None and (mask is None or mask.dim() != 4 or given.get("is_causal")):
            continue
        # Our causal attention aligns the last query with the last key, torch's the first with the first.
        if given.get("is_causal") and str(q.shape[2]) != str(k.shape[2]):
            continue
        if any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled():
            continue
        scale = given.get("scale")
        if isinstance(scale, fx.Node):
            # A number that Dynamo made an argument of the graph: it multiplies the queries.
            with graph.graph.inserting_before(node):
                given["query"] = graph.graph.call_function(operator.mul, (given["query"], scale))
            scale = 1.0
        arguments = (
            *(given[name] for name in names[:4] if name in given),
            *([None] if "attn_mask" not in given else []),
            None,
            float(scale) if scale is not None else 1.0 / math.sqrt(q.shape[-1]),
            given.get("is_causal", False),
            None,
            None,
        )
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(torch.ops.graphopt.attention.default, arguments)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
    graph.recompile()


def _example(node: Any) -> torch.Tensor | None:
    found = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None
