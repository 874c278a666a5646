"""Attention to admitted tokens: a token whose keys and values are not admitted is seen by itself and by no other.

Dynamic-LLaVA, arXiv 2412.00876. Shapes: B rows, H query heads, K KV heads, S new tokens, A entries of a cache.
"""

from __future__ import annotations

import torch

from graphopt.ops.bounded import _capped, _softmax, grouped
from graphopt.ops.library import _define, _mask, scaled_attention
from graphopt.ops.trees import sees


def _admit_tokens(score: torch.Tensor) -> torch.Tensor:
    """1 where a score is above zero, else 0, with the gradient of its sigmoid (straight through, arXiv 1308.3432)."""
    soft = torch.sigmoid(score)
    return (score > 0).to(score.dtype) + (soft - soft.detach())


def _admitted_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    admit: torch.Tensor,
) -> torch.Tensor:
    """Causal self-attention, q `[B, H, S, D]`, k, v `[B, K, S, ..]`, that sees tokens of `admit` `[B, S]` and itself.

    `mask` `[B, S]` is padding. `admit` is 1 or 0; its gradient is what a token's weight in the softmax would change, that
    of a token that is not admitted included.
    """
    if not causal or window is not None or (mask is not None and mask.dim() != 2):
        raise ValueError("tokens are admitted to causal attention without a window, whose mask is padding")
    count = q.shape[2]
    own = torch.eye(count, dtype=torch.bool, device=q.device)
    if not (torch.is_grad_enabled() and admit.requires_grad):
        kept = admit > 0.5
        if bool(kept.all()):
            return scaled_attention(q, k, v, mask, sinks, scale, causal, window, softcap)
        visible = _mask(q, mask, count, count, causal, window) & (kept[:, None, None] | own)
        return scaled_attention(q, k, v, visible, sinks, scale, False, None, softcap)
    logits = _capped(grouped(q, k) * scale, softcap)
    visible = _mask(q, mask, count, count, causal, window)[:, :, None]
    whole = _softmax(logits.masked_fill(~visible, torch.finfo(logits.dtype).min), sinks)
    weights = whole * torch.where(own, 1, admit[:, None, None, None].to(whole.dtype))
    # What sinks take stays theirs.
    taken = 1 - whole.sum(-1, keepdim=True) if sinks is not None else 0
    weights = weights / (weights.sum(-1, keepdim=True) + taken).clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.matmul(weights, v[:, :, None]).reshape(*q.shape[:3], v.shape[3])


def _admitting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    spans: torch.Tensor,
    admit: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of new tokens over the admitted entries of a cache and over each other; writes nothing.

    q `[B, H, S, D]`, k, v `[B, K, S, ..]`. `keys` and `values` `[B, K, A, ..]` hold the tokens `places` `[B, 1, A]`, -1
    for none. `spans` `[B or 1, 2, S]` (`graphopt.ops.trees`) says which new tokens see which, `admit` `[B, S]` which of
    them others may see. The caller takes the admitted ones in when it has decided what to keep.
    """
    batch, count = q.shape[0], q.shape[2]
    own = torch.eye(count, dtype=torch.bool, device=q.device)
    new = sees(spans) & ((admit > 0.5)[:, None] | own)
    old = (places >= 0).expand(batch, count, places.shape[2])
    visible = torch.cat([old, new.expand(batch, count, count)], -1)[:, None]
    # What an empty slot holds has no meaning, not even times zero.
    empty = (places < 0)[..., None]
    both_keys = torch.cat([keys.to(k.dtype).masked_fill(empty, 0), k], 2)
    both_values = torch.cat([values.to(v.dtype).masked_fill(empty, 0), v], 2)
    return scaled_attention(q, both_keys, both_values, visible, sinks, scale, False, None, softcap)


admit_tokens = _define("admit_tokens(Tensor score) -> Tensor", _admit_tokens, lambda score: torch.empty_like(score))
admitted_attention = _define(
    "admitted_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, bool causal, "
    "int? window, float? softcap, Tensor admit) -> Tensor",
    _admitted_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
admitting_attention = _define(
    "admitting_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor places, Tensor spans, "
    "Tensor admit, Tensor? sinks, float scale, float? softcap) -> Tensor",
    _admitting_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
