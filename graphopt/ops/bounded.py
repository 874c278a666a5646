"""Attention whose cache is bounded: the meaning, as a mask over everything, and the ragged form that holds less.

A policy says what a KV head still sees of the past: the first `sink` tokens, the last `recent` ones (the token's own
among them), `heavy` others by the attention that they have received, and, with `compensate`, one entry that stands for
all that is gone. What a token sees follows from the text alone, not from the pieces in which it is fed. Shapes: B rows,
H query heads, K KV heads, S new tokens, T tokens, C entries of a cache, D and E head sizes of keys and values.
"""

from __future__ import annotations

import torch

from graphopt.ops.library import _define, scaled_attention
from graphopt.ops.trees import is_straight, sees


def capacity(sink: int, recent: int, heavy: int) -> int:
    """Entries that a bounded head keeps, the compensation entry aside."""
    return sink + recent + heavy


def held_places(lengths: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """Which token lies in each slot after `lengths` `[B]` tokens, `[B, sink + recent]`; -1 where none does.

    Slot s below `sink` holds token s; the others are a ring.
    """
    slots = torch.arange(sink + recent, device=lengths.device)
    behind = lengths[:, None] - 1 - slots
    ring = slots + recent * torch.div(behind, recent, rounding_mode="floor")
    return torch.where(behind < 0, -1, torch.where(slots < sink, slots, ring))


def grouped(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products of queries `[B, H, S, D]` with their group's keys `[B, K, T, D]`, `[B, K, H / K, S, T]`."""
    batch, heads, count, size = q.shape
    kv_heads = keys.shape[1]
    rows = q.reshape(batch, kv_heads, heads // kv_heads * count, size)
    found = torch.matmul(rows, keys.to(q.dtype).transpose(-1, -2))
    return found.reshape(batch, kv_heads, heads // kv_heads, count, keys.shape[2])


def _capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Probabilities over the last axis of `[B, K, G, .., T]`; `sinks` `[H]` take mass and give nothing."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sinks is None:
        return torch.softmax(wide, -1).to(logits.dtype)
    shape = [1, *wide.shape[1:3], *[1] * (wide.dim() - 3)]
    column = sinks.to(wide.dtype).reshape(shape).expand(*wide.shape[:-1], 1)
    return torch.softmax(torch.cat([wide, column], -1), -1)[..., :-1].to(logits.dtype)


def _hide(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~visible, torch.finfo(logits.dtype).min)


def drop(
    mass: torch.Tensor, alive: torch.Tensor, places: torch.Tensor, now: torch.Tensor, sink: int, recent: int, keep: int
) -> torch.Tensor:
    """What stays of `alive` `[B, K, T]` when more than `keep` entries are: the one of least mass goes (H2O, 2306.14048).

    The first `sink` tokens and the last `recent` before and at place `now` `[B, 1, 1]` never go; of equal masses the
    earlier token does.
    """
    allowed = alive & (places >= sink) & (now - places >= recent)
    weight = mass.masked_fill(~allowed, torch.inf)
    least = weight == weight.amin(-1, keepdim=True)
    last = torch.iinfo(places.dtype).max
    first = places.expand_as(mass).masked_fill(~(least & allowed), last)
    goes = (first == first.amin(-1, keepdim=True)) & (first < last) & (alive.sum(-1, keepdim=True) > keep)
    return alive & ~goes


def _chosen(
    logits: torch.Tensor, causal: torch.Tensor, real: torch.Tensor, sinks: torch.Tensor | None, policy: tuple[int, ...]
) -> torch.Tensor:
    """Probabilities `[B, K, G, T, T]` when heavy hitters stay, decided row by row on the whole mask."""
    sink, recent, heavy = policy
    keep = capacity(sink, recent, heavy)
    batch, kv_heads, _, count, _ = logits.shape
    places = (real.to(torch.int64).cumsum(1) - 1)[:, None]
    alive = torch.zeros(batch, kv_heads, count, dtype=torch.bool, device=logits.device)
    mass = torch.zeros(batch, kv_heads, count, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.device)
    rows = []
    for i in range(count):
        alive = alive | (torch.arange(count, device=logits.device) == i)
        row = _softmax(_hide(logits[..., i, :], (alive & causal[:, :, i])[:, :, None]), sinks)
        rows.append(row)
        mass = mass + row.detach().sum(2).to(mass.dtype) * real[:, i, None, None]
        fewer = drop(mass, alive & real[:, None], places, places[..., i : i + 1], sink, recent, keep)
        alive = torch.where(real[:, i, None, None], fewer | (alive & ~real[:, None]), alive)
    return torch.stack(rows, 3)


def _meaning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    renumbered: torch.Tensor | None,
    sink: int,
    recent: int,
    heavy: int,
    compensate: bool,
) -> torch.Tensor:
    """Every head bounded, as a mask over all tokens."""
    batch, heads, count, _ = q.shape
    steps = torch.arange(count, device=q.device)
    real = torch.ones(batch, count, dtype=torch.bool, device=q.device) if mask is None else mask.to(torch.bool)
    places = real.to(torch.int64).cumsum(1) - 1
    causal = ((steps[:, None] >= steps) & real[:, None])[:, None]
    first = (places < sink)[:, None, None]
    near = (places[:, :, None] - places[:, None] < recent)[:, None]
    logits = grouped(q, k) * scale
    if renumbered is not None:
        logits = torch.where(first[:, :, None], grouped(renumbered, k) * scale, logits)
    logits = _capped(logits, softcap)
    if heavy:
        weights = _chosen(logits, causal, real, sinks, (sink, recent, heavy))
        return torch.matmul(weights, v[:, :, None]).reshape(batch, heads, count, v.shape[3])
    logits = _hide(logits, (causal & (first | near))[:, :, None])
    if not compensate:
        weights = _softmax(logits, sinks)
        return torch.matmul(weights, v[:, :, None]).reshape(batch, heads, count, v.shape[3])
    gone = (causal & ~first & ~near).to(q.dtype)
    number = gone.sum(-1, keepdim=True)
    share = gone / number.clamp(min=1)
    key, value = torch.matmul(share, k), torch.matmul(share, v)
    column = _column(q, key, number, scale, softcap)
    weights = _softmax(torch.cat([logits, column], -1), sinks)
    found = torch.matmul(weights[..., :-1], v[:, :, None]) + weights[..., -1:] * value[:, :, None]
    return found.reshape(batch, heads, count, v.shape[3])


def _column(
    q: torch.Tensor, key: torch.Tensor, number: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Logits `[B, K, G, S, 1]` of an entry `[B, K, S, D]` that stands for `number` `[B, 1, S, 1]` equal ones."""
    batch, heads, count, size = q.shape
    rows = q.reshape(batch, key.shape[1], heads // key.shape[1], count, size)
    logits = _capped((rows * key[:, :, None]).sum(-1, keepdim=True) * scale, softcap)
    held = (number > 0)[:, :, None]
    return _hide(logits + number.clamp(min=1).log()[:, :, None], held)


def _bounded_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    renumbered: torch.Tensor | None,
    gates: torch.Tensor | None,
    heads: list[int],
    sink: int,
    recent: int,
    heavy: int,
    compensate: bool,
) -> torch.Tensor:
    """Causal attention in which the KV heads `heads` are bounded, q `[B, H, S, D]`, k, v `[B, K, S, ..]` to `[B, H, S, E]`.

    Other heads see everything. `mask` `[B, S]` is padding. `renumbered` are the queries turned as if they stood at
    place sink + recent - 1 at most: what they see among the first `sink` tokens, so that places are those inside the
    cache (StreamingLLM, arXiv 2309.17453). `gates` `[K]` in 0..1 mix: all of the whole attention at 1, all of the
    bounded one at 0 (DuoAttention, arXiv 2410.10819).
    """
    if not causal or window is not None or (mask is not None and mask.dim() != 2):
        raise ValueError("a bounded cache is that of causal attention without a window, and its mask is padding")
    whole = scaled_attention(q, k, v, mask, sinks, scale, causal, window, softcap)
    if not heads:
        return whole
    group = q.shape[1] // k.shape[1]
    kv = torch.tensor(heads, device=q.device)
    rows = (kv[:, None] * group + torch.arange(group, device=q.device)).flatten()

    def of(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None else x[:, rows]

    found = _meaning(
        q[:, rows], k[:, kv], v[:, kv], mask, None if sinks is None else sinks[rows], scale, softcap, of(renumbered),
        sink, recent, heavy, compensate,
    )  # fmt: skip
    if gates is not None:
        gate = gates.clamp(0, 1)[kv].repeat_interleave(group).to(q.dtype)[:, None, None]
        found = gate * whole[:, rows] + (1 - gate) * found
    return whole.index_copy(1, rows, found)


def _held_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    spans: torch.Tensor,
    weights: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    renumbered: torch.Tensor | None,
    sink: int,
    recent: int,
    compensate: bool,
) -> torch.Tensor:
    """Attention of new tokens over what bounded heads hold and over each other; writes nothing.

    q `[B, H, S, D]`, k, v `[B, K, S, ..]`; `keys` and `values` `[B, K, C, ..]` hold the first `sink` and the last
    `recent` tokens of `lengths` `[B]` (a ring), and with `compensate` one entry more, the mean of all that is gone.
    `positions` `[B, S]` and `spans` `[B or 1, 2, S]` (`graphopt.ops.trees`) place the new tokens. `weights`
    `[B, H, S, C + S]` are the probabilities when they are known already. The caller takes k and v in when it has decided
    what to keep.
    """
    batch, heads, count, _ = q.shape
    kv_heads, size = k.shape[1], sink + recent
    shape = (batch, heads, count, v.shape[3])
    if weights is not None:
        given = weights.reshape(batch, kv_heads, -1, weights.shape[-1])
        old, new = given.split([values.shape[2], count], -1)
        return (torch.matmul(old, values.to(q.dtype)) + torch.matmul(new, v)).reshape(shape)
    places = held_places(lengths, sink, recent)[:, None]
    now, own = positions[:, :, None], positions[:, None]
    first = torch.cat([places < sink, own < sink], -1)[:, None]
    near = torch.cat([now - places < recent, now - own < recent], -1)[:, None]
    seen = torch.cat([(places >= 0).expand(-1, count, -1), sees(spans).expand(batch, -1, -1)], -1)[:, None]
    held = keys[:, :, :size]
    logits = torch.cat([grouped(q, held), grouped(q, k)], -1)
    if renumbered is not None:
        turned = torch.cat([grouped(renumbered, held), grouped(renumbered, k)], -1)
        logits = torch.where(first[:, :, None], turned, logits)
    logits = _hide(_capped(logits * scale, softcap), (seen & (first | near))[:, :, None])
    if not compensate:
        found = _softmax(logits, sinks).reshape(batch, kv_heads, -1, size + count)
        old, new = found.split([size, count], -1)
        return (torch.matmul(old, values[:, :, :size].to(q.dtype)) + torch.matmul(new, v)).reshape(shape)
    gone = (seen & ~first & ~near).to(q.dtype)
    before = (lengths - size).clamp(min=0).to(q.dtype)[:, None, None, None]
    number = gone.sum(-1, keepdim=True) + before
    means = []
    for buffer, new in ((keys, k), (values, v)):
        # What an empty slot holds has no meaning, not even times zero.
        known = buffer[:, :, :size].to(q.dtype).masked_fill((places < 0)[..., None], 0)
        base = buffer[:, :, size:].to(q.dtype).masked_fill(before == 0, 0)
        means.append((torch.matmul(gone, torch.cat([known, new], 2)) + before * base) / number.clamp(min=1))
    column = _column(q, means[0], number, scale, softcap)
    found = _softmax(torch.cat([logits, column], -1), sinks)
    old, new, rest = found.split([size, count, 1], -1)
    mixed = torch.matmul(old, values[:, :, None, :size].to(q.dtype)) + torch.matmul(new, v[:, :, None])
    return (mixed + rest * means[1][:, :, None]).reshape(shape)


def _heavy_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    mass: torch.Tensor,
    lengths: torch.Tensor,
    spans: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sink: int,
    recent: int,
    heavy: int,
) -> torch.Tensor:
    """Probabilities `[B, H, S, C + S]` of new tokens over what heavy-hitter heads hold and over each other.

    `places` `[B, K, C]` are the tokens held, -1 for none, and `mass` `[B, K, C]` the attention that they have received.
    After each token the least of what may go goes, so that the next does not see it. Raises ValueError for a token
    tree: what goes is decided in the order of the text.
    """
    batch, heads, count, _ = q.shape
    if count > 1 and not is_straight(spans):
        raise ValueError("heavy hitters are decided in the order of the text: a token tree has none")
    size = places.shape[2]
    steps = torch.arange(count, device=q.device)
    where = torch.cat([places, (lengths[:, None, None] + steps).expand(-1, places.shape[1], -1)], -1)
    alive = torch.cat([places >= 0, torch.zeros_like(where[..., size:], dtype=torch.bool)], -1)
    total = torch.cat([mass, mass.new_zeros(where[..., size:].shape)], -1)
    logits = _capped(torch.cat([grouped(q, keys), grouped(q, k)], -1) * scale, softcap)
    rows = []
    for i in range(count):
        alive = alive | (torch.arange(size + count, device=q.device) == size + i)
        rows.append(_softmax(_hide(logits[..., i, :], alive[:, :, None]), sinks))
        if i + 1 < count:
            total = total + rows[-1].detach().sum(2).to(total.dtype)
            alive = drop(total, alive, where, where[:, :1, size + i, None], sink, recent, size)
    return torch.stack(rows, 3).reshape(batch, heads, count, size + count)


bounded_attention = _define(
    "bounded_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, float scale, bool causal, "
    "int? window, float? softcap, Tensor? renumbered, Tensor? gates, int[] heads, int sink, int recent, int heavy, "
    "bool compensate) -> Tensor",
    _bounded_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
held_attention = _define(
    "held_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor lengths, Tensor positions, "
    "Tensor spans, Tensor? weights, Tensor? sinks, float scale, float? softcap, Tensor? renumbered, int sink, "
    "int recent, bool compensate) -> Tensor",
    _held_attention,
    lambda q, k, v, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3])),
)
heavy_weights = _define(
    "heavy_weights(Tensor q, Tensor k, Tensor keys, Tensor places, Tensor mass, Tensor lengths, Tensor spans, "
    "Tensor? sinks, float scale, float? softcap, int sink, int recent, int heavy) -> Tensor",
    _heavy_weights,
    lambda q, k, keys, *rest: q.new_empty((q.shape[0], q.shape[1], q.shape[2], keys.shape[2] + k.shape[2])),
)
