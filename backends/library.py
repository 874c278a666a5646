"""What graphs for a CPU call where eager would call more, or slower, functions of torch. Imports nothing but torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from graphopt.ops.library import _mask

# Multiplications from which on oneDNN, called for plain weights, is faster than the library behind torch.nn.functional.
LARGE = 1 << 20
# What oneDNN computes behind a product: its name and algorithm, and the same by torch.
AFTER: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("none", ""): lambda x: x,
    ("swish", ""): lambda x: F.silu(x, inplace=True),
    ("relu", ""): torch.relu_,
    ("sigmoid", ""): torch.sigmoid_,
    ("tanh", ""): torch.tanh_,
    ("gelu", "none"): F.gelu,
    ("gelu", "tanh"): lambda x: F.gelu(x, approximate="tanh"),
}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x `[.., in]` times weight `[out, in]`, with oneDNN where there is enough to do: it asks more for a call."""
    if x.numel() * weight.shape[0] < LARGE:
        return torch._C._nn.linear(x, weight, bias)  # type: ignore[no-any-return]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", (), "")  # type: ignore[no-any-return]


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times `weight`, with one tensor of x's size beside the result."""
    scale = torch.mul(x, x).mean(-1, True).add_(eps).rsqrt_()
    result = torch.mul(x, scale)
    return result if weight is None else result.mul_(weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the features `[.., D]`, pairing i with i + D/2, without a turned copy."""
    half = x.shape[-1] // 2
    result = torch.mul(x, cos)
    result.narrow(-1, 0, half).addcmul_(x.narrow(-1, half, half), sin.narrow(-1, 0, half), value=-1)
    result.narrow(-1, half, half).addcmul_(x.narrow(-1, 0, half), sin.narrow(-1, half, half))
    return result


def gain_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times `weight`, from the norm of x: fewer calls, other roundings."""
    scale = torch.linalg.vector_norm(x, 2, -1, True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    result = torch.mul(x, scale)
    return result if weight is None else result.mul_(weight)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, after: str = "none", algorithm: str = ""
) -> torch.Tensor:
    """`after` of x `[.., in]` times weight `[out, in]`, plain or packed; small products with plain ones are torch's."""
    if weight.is_mkldnn or x.numel() * weight.shape[0] >= LARGE:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, after, (), algorithm)  # type: ignore[no-any-return]
    return AFTER[after, algorithm](F.linear(x, weight, bias))


def product_with(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor, kind: str
) -> torch.Tensor:
    """x `[.., in]` times weight `[out, in]`, plus or times `other` of the result's shape."""
    if weight.is_mkldnn or x.numel() * weight.shape[0] >= LARGE:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, kind)  # type: ignore[no-any-return]
    result = F.linear(x, weight, bias)
    return result.add_(other) if kind == "add" else result.mul_(other)


def visible(
    padding: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None
) -> torch.Tensor | None:
    """Which keys `[B or 1, 1, S, T]` queries see; None where they see all, or all before them, as `causal` says."""
    whole = padding is None or bool(padding.all())
    if whole and (not causal or queries == keys) and (window is None or window >= keys):
        return None
    anchor = torch.empty(0) if padding is None else padding
    return _mask(anchor, None if whole else padding, queries, keys, causal, window)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    """Attention where `seen`, which `visible` gave, says; q `[B, H, S, D]`, k and v `[B, K, T, ..]`."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=causal and seen is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def pack(weight: torch.Tensor, turned: bool) -> torch.Tensor:
    """A weight `[out, in]`, or `[in, out]` where it is turned, in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous() if turned else weight)  # type: ignore[no-any-return]
