"""Attention whose older keys and values are in few bits (KIVI, arXiv 2402.02750): the meaning, and the packed cache.

Tokens are taken in blocks of `group`. Keys of a block share a scale for each feature, over its tokens; values share one
for `group` features of a token. A query reads a block in few bits once at least `recent` tokens, its own among them,
stand behind the block, and in full precision before: that follows from the text alone. Shapes: B rows, H query heads, K
KV heads, S new tokens, T tokens, N blocks of g tokens, R slots of a ring, D and E head sizes of keys and values.
"""

from __future__ import annotations

import torch

from graphopt.ops.bounded import _capped, _hide, _softmax, grouped, held_places
from graphopt.ops.library import _define
from graphopt.ops.quantised import dequantise, groups, quantise
from graphopt.ops.trees import is_straight, sees


def first_exact(places: torch.Tensor, group: int, recent: int) -> torch.Tensor:
    """The first token that a query at `places` reads in full precision; all before it are in few bits."""
    return torch.div(places + 1 - recent, group, rounding_mode="floor").clamp(min=0) * group


def pack_keys(keys: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole blocks of keys `[B, K, N g, D]` as bytes `[B, K, N, D, ..]` with scale and lowest value `[B, K, N, D, 1]`."""
    return quantise(keys.unflatten(2, (-1, group)).transpose(-1, -2), bits, group)


def pack_values(values: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole blocks of values `[B, K, N g, E]` as bytes `[B, K, N, g, ..]`, scale and lowest value `[B, K, N, g, groups]`."""
    return quantise(values.unflatten(2, (-1, group)), bits, min(group, values.shape[-1]))


def unpacked_keys(packed: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The inverse of `pack_keys`, `[B, K, N g, D]`."""
    found: torch.Tensor = dequantise(packed, scale, low, bits, group, group)
    return found.transpose(-1, -2).flatten(2, 3)


def unpacked_values(
    packed: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, group: int, size: int
) -> torch.Tensor:
    """The inverse of `pack_values`, `[B, K, N g, E]` with E = `size`."""
    found: torch.Tensor = dequantise(packed, scale, low, bits, min(group, size), size)
    return found.flatten(2, 3)


def _coarse(k: torch.Tensor, v: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of consecutive tokens as their blocks' grids hold them; a last block that is not full, too."""
    count = k.shape[2]
    missing = -count % group
    whole = [torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2) for x in (k, v)]
    keys = unpacked_keys(*pack_keys(whole[0], bits, group), bits, group)
    values = unpacked_values(*pack_values(whole[1], bits, group), bits, group, v.shape[3])
    return keys[:, :, :count], values[:, :, :count]


def _mix(weights: torch.Tensor, old: torch.Tensor, coarse: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Values `[B, K, T, E]` by weights `[B, K, G, S, T]`, in few bits where `old` `[B, 1, 1, S, T]` says so."""
    return torch.matmul(weights * old, coarse[:, :, None]) + torch.matmul(weights * ~old, exact[:, :, None])


def _quantised_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    bits: int,
    group: int,
    recent: int,
) -> torch.Tensor:
    """Causal attention, q `[B, H, S, D]`, k, v `[B, K, S, ..]` to `[B, H, S, E]`, whose older keys and values are coarse.

    `mask` `[B, S]` is padding, which no block counts.
    """
    if not causal or window is not None or (mask is not None and mask.dim() != 2):
        raise ValueError("a quantised cache is that of causal attention without a window, and its mask is padding")
    batch, heads, count, _ = q.shape
    steps = torch.arange(count, device=q.device)
    real = torch.ones(batch, count, dtype=torch.bool, device=q.device) if mask is None else mask.to(torch.bool)
    places = real.to(torch.int64).cumsum(1) - 1
    # Real tokens move together, so that a block is a slice, and back.
    order = (~real).to(torch.int8).argsort(dim=-1, stable=True)[:, None, :, None]
    back = places.clamp(min=0)[:, None, :, None]
    moved = [x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])) for x in (k, v)]
    coarse = [
        x.gather(2, back.expand(-1, x.shape[1], -1, x.shape[3])) for x in _coarse(moved[0], moved[1], bits, group)
    ]
    old = (places[:, None] < first_exact(places, group, recent)[:, :, None])[:, None, None]
    logits = _capped(torch.where(old, grouped(q, coarse[0]), grouped(q, k)) * scale, softcap)
    seen = ((steps[:, None] >= steps) & real[:, None])[:, None, None]
    weights = _softmax(_hide(logits, seen), sinks)
    return _mix(weights, old, coarse[1], v).reshape(batch, heads, count, v.shape[3])


def tail(ring: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor, group: int) -> torch.Tensor:
    """Tokens from the first of the last block that `lengths` `[B]` begin, `[B, K, N g, D]`: from a ring, then new ones.

    What stands behind the last token repeats it.
    """
    size, count = ring.shape[2], new.shape[2]
    number = groups(group - 1 + count, group) * group
    base = lengths // group * group
    tokens = base[:, None] + torch.arange(number, device=lengths.device)
    behind = (tokens - lengths[:, None]).clamp(max=count - 1)
    index = torch.where(behind < 0, tokens % size, size + behind)[:, None, :, None]
    both = torch.cat([ring.to(new.dtype), new], 2)
    return both.gather(2, index.expand(-1, both.shape[1], -1, both.shape[3]))


def _packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    spans: torch.Tensor,
    packed_keys: torch.Tensor,
    key_scale: torch.Tensor,
    key_low: torch.Tensor,
    packed_values: torch.Tensor,
    value_scale: torch.Tensor,
    value_low: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    bits: int,
    group: int,
    recent: int,
) -> torch.Tensor:
    """Attention of new tokens over a quantised cache and over each other; writes nothing.

    q `[B, H, S, D]`, k, v `[B, K, S, ..]`; `keys` and `values` `[B, K, recent + group, ..]` are a ring of the last of
    `lengths` `[B]` tokens in full precision, the others hold every whole block as `pack_keys` and `pack_values` give it.
    `positions` `[B, S]` and `spans` `[B or 1, 2, S]` place the new tokens. Raises ValueError for a token tree that is so
    deep that its own tokens would be packed: blocks are those of one text.
    """
    batch, heads, count, _ = q.shape
    edge = first_exact(positions, group, recent)[:, :, None]
    places = held_places(lengths, 0, keys.shape[2])
    committed = torch.arange(packed_keys.shape[2] * group, device=q.device)[None]
    base = (lengths // group * group)[:, None]
    old_keys = [unpacked_keys(packed_keys, key_scale, key_low, bits, group)]
    old_values = [unpacked_values(packed_values, value_scale, value_low, bits, group, v.shape[3])]
    old_places, there = [committed.expand(batch, -1)], [committed < base]
    if bool((edge[..., 0] > base).any()):
        if not is_straight(spans):
            raise ValueError(f"blocks are those of one text: a token tree may be {recent} deep over this cache")
        made = _coarse(tail(keys, k, lengths, group), tail(values, v, lengths, group), bits, group)
        fresh = base + torch.arange(made[0].shape[2], device=q.device)
        old_keys, old_values = [*old_keys, made[0]], [*old_values, made[1]]
        old_places, there = [*old_places, fresh], [*there, torch.ones_like(fresh, dtype=torch.bool)]
    coarse = torch.cat(old_keys, 2).to(q.dtype)
    old = torch.cat(there, -1)[:, None] & (torch.cat(old_places, -1)[:, None] < edge)
    held = (places >= 0)[:, None] & (places[:, None] >= edge)
    near = sees(spans).expand(batch, -1, -1) & (positions[:, None] >= edge)
    logits = torch.cat([grouped(q, coarse), grouped(q, keys), grouped(q, k)], -1)
    seen = torch.cat([old, held, near], -1)[:, None, None]
    weights = _softmax(_hide(_capped(logits * scale, softcap), seen), sinks)
    # What no query sees has no meaning, not even times zero.
    parts = [torch.cat(old_values, 2), values, v]
    shown = [(part.any(1))[:, None, :, None] for part in (old, held, near)]
    read = torch.cat([x.to(q.dtype).masked_fill(~is_shown, 0) for x, is_shown in zip(parts, shown, strict=True)], 2)
    return torch.matmul(weights, read[:, :, None]).reshape(batch, heads, count, v.shape[3])


quantised_attention = _define(
    "quantised_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, bool causal, "
    "int? window, float? softcap, int bits, int group, int recent) -> Tensor",
    _quantised_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
packed_attention = _define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor lengths, Tensor positions, "
    "Tensor spans, Tensor packed_keys, Tensor key_scale, Tensor key_low, Tensor packed_values, Tensor value_scale, "
    "Tensor value_low, Tensor? sinks, float scale, float? softcap, int bits, int group, int recent) -> Tensor",
    _packed_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
