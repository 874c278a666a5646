"""Faster callables for the ops of a step: torch's own bindings of the same kernels, and fewer calls for ours.

An `OpOverload` called from Python costs about a microsecond more than the binding that torch.add and its like are; with
hundreds of calls in a step that is a good part of its time. Every entry takes the positional arguments of its op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten
_nn = torch._C._nn
# Packed weights are blocked for so many rows; other numbers read the same blocks.
_ROWS = 8

NATIVE: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.Tensor.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.contiguous.default: torch.Tensor.contiguous,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.Tensor.div,
    aten.embedding.default: torch.embedding,
    aten.expand.default: torch.Tensor.expand,
    aten.gelu.default: _nn.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: _nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mm.default: torch.mm,
    aten.mul.Tensor: torch.Tensor.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: _nn.silu,
    aten.sin.default: torch.sin,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.squeeze.dim: torch.squeeze,
    aten.stack.default: torch.stack,
    aten.sub.Tensor: torch.Tensor.sub,
    aten.sym_size.int: torch.Tensor.size,
    aten.tanh.default: torch.tanh,
    aten.to.dtype: torch.Tensor.to,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: torch.Tensor.view,
}


def packs(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether products of this kind have packed weights: float32 on a CPU, where torch has oneDNN."""
    return dtype == torch.float32 and torch.device(device).type == "cpu" and bool(torch.backends.mkldnn.is_available())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight `[out, in]` in oneDNN's blocked layout, which `packed_linear()` alone reads."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def packed_linear() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The product of x `[.., in]`, a packed weight and a bias or None, and what it takes behind them."""
    return torch.ops.mkldnn._linear_pointwise.default, ("none", (), "")


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: torch.Tensor, share: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) times `weight` `[d]` in x's own (float32 or wider) dtype; `share` is 1 / d."""
    size = torch.linalg.vector_norm(x, 2, -1, True)
    normed = x.mul(eps.addcmul(size, size, value=share).rsqrt_())
    return normed if weight is None else normed.mul_(weight)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, half: int) -> torch.Tensor:
    """Rotary embedding of all features of `[B, H, S, D]`, pairing i with i + D/2; `sin` is negated in its first half."""
    return x.mul(cos).addcmul_(x.roll(half, -1), sin)
