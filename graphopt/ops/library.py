"""The graphopt operations: attention, its mask, RMS normalisation and rotary embedding.

Each op is defined by its eager reference below. Shapes: B batch, H query heads, K KV heads (K divides H), S query
length, T key length, D head size. References run in any floating dtype, float64 included, because verification compares
against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

LIBRARY = torch.library.Library("graphopt", "DEF")


def _mask(
    anchor: torch.Tensor, padding: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None
) -> torch.Tensor:
    """Visibility of keys to queries, bool `[B or 1, 1, S, T]`; `padding` `[B, T]` is true at real tokens."""
    rows = torch.arange(queries, device=anchor.device)[:, None] + (keys - queries)
    columns = torch.arange(keys, device=anchor.device)[None, :]
    visible = (columns <= rows) if causal else (columns == columns) & (rows == rows)
    if window is not None:
        visible = visible & (columns > rows - window)
        if not causal:
            visible = visible & (columns < rows + window)
    visible = visible[None, None]
    if padding is not None:
        visible = visible & padding.to(torch.bool)[:, None, None, :]
    return visible


def scaled_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Scaled dot-product attention: q `[B, H, S, D]`, k `[B, K, T, D]`, v `[B, K, T, E]` to `[B, H, S, E]`.

    `mask` is key padding `[B, T]` (true at real tokens), visibility `[B, 1 or H, S, T]` (bool) or an additive bias of
    that shape; `sinks` `[H]` are extra logits that take mass and give no value (gpt-oss); `window` counts visible
    positions, the query's own included; `softcap` c replaces logits x by c tanh(x / c).
    """
    heads, kv_heads, queries, keys = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if mask is not None and mask.dim() == 2:
        mask = _mask(q, mask, queries, keys, causal, window)
    elif causal or window is not None:
        if mask is None and window is None and softcap is None and sinks is None and queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
        visible = _mask(q, None, queries, keys, causal, window)
        if mask is None:
            mask = visible
        elif mask.dtype == torch.bool:
            mask = mask & visible
        else:
            mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    if softcap is None and sinks is None:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=heads != kv_heads)
    group = heads // kv_heads
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        low = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, low) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sinks is not None:
        column = sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(q.shape[0], -1, queries, 1)
        logits = torch.cat([logits, column], dim=-1)
    probabilities = torch.softmax(logits, dim=-1)[..., :keys].to(q.dtype)
    return torch.matmul(probabilities, v)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain_in_float: bool) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, times `weight` `[d]`; statistics in float32 or wider.

    `gain_in_float` says whether the gain multiplies before (Gemma) or after (Llama) the result returns to x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if gain_in_float:
        return (normed * weight.to(wide.dtype)).to(x.dtype)
    return normed.to(x.dtype) * weight.to(x.dtype)


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the leading R features of x `[B, H, S, D]` by cos, sin `[B, 1, S, R]`; the rest passes.

    Half layout pairs feature i with i + R/2 (cos, sin repeat as two halves); interleaved pairs 2i with 2i + 1
    (cos, sin repeat each entry twice).
    """
    width = cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    if interleaved:
        pairs = head.unflatten(-1, (width // 2, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-head[..., width // 2 :], head[..., : width // 2]], dim=-1)
    rotated = (head * cos + turned * sin).to(x.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


def _define(schema: str, reference: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> Any:
    """Register an op whose kernel is `reference` and whose gradient is that of the reference, recomputed."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{name}", fake, lib=LIBRARY)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.rest = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arguments = list(ctx.rest)
        wanted = []
        for i, saved in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            arguments[i] = saved.detach().requires_grad_(ctx.needs_input_grad[i])
            if ctx.needs_input_grad[i]:
                wanted.append(i)
        with torch.enable_grad():
            result = reference(*arguments)
        found = torch.autograd.grad(result, [arguments[i] for i in wanted], grad, allow_unused=True)
        gradients: list[torch.Tensor | None] = [None] * len(arguments)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)

    torch.library.register_autograd(f"graphopt::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.graphopt, name).default


attention = _define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, bool causal, int? window, "
    "float? softcap) -> Tensor",
    scaled_attention,
    lambda q, k, v, mask, sinks, scale, causal, window, softcap: q.new_empty(
        (q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    ),
)
attention_mask = _define(
    "attention_mask(Tensor anchor, Tensor? padding, SymInt queries, SymInt keys, bool causal, int? window) -> Tensor",
    _mask,
    lambda anchor, padding, queries, keys, causal, window: anchor.new_empty(
        (padding.shape[0] if padding is not None else 1, 1, queries, keys), dtype=torch.bool
    ),
)
rms_norm = _define(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool gain_in_float) -> Tensor",
    _rms_norm,
    lambda x, weight, eps, gain_in_float: torch.empty_like(x),
)
rotary = _define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _rotary,
    lambda x, cos, sin, interleaved: torch.empty_like(x),
)


def register() -> None:
    """Make `torch.ops.graphopt` available; importing this module has already done it."""
