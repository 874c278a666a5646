"""Contracts of attention, norms and rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from graphopt.ops import attention, attention_mask, cached_attention, rms_norm, rotary
from graphopt.ops.trees import walk
from graphopt.testing.contracts.contract import LENGTHS, Contract, Numbers, Sample

HEAD_SIZES = (2, 1, 3, 4, 8, 16)


@dataclass(frozen=True)
class _Heads:
    """Sizes of an attention."""

    batch: int
    heads: int
    kv_heads: int
    size: int
    value_size: int


@st.composite
def _heads(draw: st.DrawFn) -> _Heads:
    kv_heads = draw(st.integers(1, 3))
    size = draw(st.sampled_from(HEAD_SIZES))
    other = draw(st.booleans())
    return _Heads(
        draw(st.integers(1, 3)),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        size,
        draw(st.sampled_from(HEAD_SIZES)) if other else size,
    )


WINDOWS = st.sampled_from((None, 1, 2, 5, 64))
SOFTCAPS = st.sampled_from((None, 2.0, 30.0))


def _attention_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        of = draw(_heads())
        queries = draw(st.sampled_from(LENGTHS))
        keys = queries + draw(st.sampled_from((0, 0, 1, 6)))
        causal, window = draw(st.booleans()), draw(WINDOWS)
        turned = draw(st.booleans())
        q = random(of.batch, of.heads, queries, of.size, turned=turned)
        k = random(of.batch, of.kv_heads, keys, of.size, turned=turned)
        v = random(of.batch, of.kv_heads, keys, of.value_size, turned=turned)
        mask = _mask_of(draw, random, of, queries, keys)
        sinks = random(of.heads) if draw(st.booleans()) else None
        seen = _seen(mask, queries, keys, causal, window)
        arguments = (q, k, v, mask, sinks, of.size**-0.5, causal, window, draw(SOFTCAPS))
        # A query that sees no key has no meaning.
        return Sample(arguments, seen.any(-1, keepdim=True).expand(of.batch, of.heads, queries, 1))

    return samples()


def _mask_of(draw: st.DrawFn, random: Numbers, of: _Heads, queries: int, keys: int) -> torch.Tensor | None:
    kind = draw(st.sampled_from(("none", "padding", "bool", "bias")))
    if kind == "none":
        return None
    if kind == "padding":
        padding = torch.ones(of.batch, keys, dtype=torch.bool)
        padding[-1, : draw(st.integers(0, keys - 1))] = False
        return padding
    rows, heads = draw(st.sampled_from(((of.batch, of.heads), (1, 1), (of.batch, 1))))
    noise = random(rows, heads, queries, keys)
    return noise > -0.5 if kind == "bool" else noise


def _rms_norm_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        width = draw(st.sampled_from((1, 2, 3, 7, 64, 129)))
        shape = draw(st.sampled_from(((1,), (2, 3), (1, 5, 2), (0, 2))))
        x = random(*shape, width) * draw(st.sampled_from((1.0, 1e-3, 100.0)))
        weight = random(width) if draw(st.booleans()) else None
        return Sample((x, weight, draw(st.sampled_from((1e-5, 1e-6, 0.1))), draw(st.booleans())))

    return samples()


def _rotary_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        width = 2 * draw(st.integers(1, 5))
        rest = draw(st.integers(0, 3))
        near = draw(st.booleans())
        batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(LENGTHS))
        x = random(batch, heads, length, width + rest, turned=draw(st.booleans()))
        angle = 3 * random(draw(st.sampled_from((1, batch))), 1, length, width // 2, dtype=torch.float32)
        angle = angle.repeat_interleave(2, -1) if near else torch.cat([angle, angle], -1)
        return Sample((x, angle.cos().to(dtype), angle.sin().to(dtype), near))

    return samples()


def _mask_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        queries = draw(st.sampled_from(LENGTHS))
        keys = queries + draw(st.sampled_from((0, 1, 6)))
        batch = draw(st.integers(1, 3))
        padding = random(batch, keys) > -0.5 if draw(st.booleans()) else None
        anchor = torch.zeros(batch, 1, dtype=dtype)
        return Sample((anchor, padding, queries, keys, draw(st.booleans()), draw(WINDOWS)))

    return samples()


def _cached_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        count, tree = draw(st.sampled_from(((1, False), (2, False), (3, True), (3, False), (7, True), (2, True))))
        of = draw(_heads())
        held = draw(st.lists(st.integers(0, 9), min_size=of.batch, max_size=of.batch))
        held = [held[0]] * of.batch if draw(st.booleans()) else held
        capacity = max(held) + count + draw(st.integers(0, 3))
        lengths = torch.tensor(held)
        spans, depth = walk(_parents(random, of.batch, count, tree))
        positions = lengths[:, None] + depth
        arguments = (
            random(of.batch, of.heads, count, of.size),
            random(of.batch, of.kv_heads, count, of.size),
            random(of.batch, of.kv_heads, count, of.value_size),
            random(of.batch, of.kv_heads, capacity, of.size),
            random(of.batch, of.kv_heads, capacity, of.value_size),
            lengths,
            positions.expand(of.batch, count).contiguous(),
            spans,
            random(1, of.heads, count, capacity) if draw(st.booleans()) else None,
            random(of.heads) if draw(st.booleans()) else None,
            of.size**-0.5,
            draw(WINDOWS),
            draw(SOFTCAPS),
        )
        return Sample(arguments)

    return samples()


def _parents(random: Numbers, batch: int, count: int, tree: bool) -> tuple[tuple[int, ...], ...]:
    """What each new token hangs on: ordinary text, or a tree of its own for each row."""
    if not tree:
        return (tuple(range(-1, count - 1)),)
    return tuple(
        (-1, *(int(torch.randint(node, (), generator=random.generator)) for node in range(1, count)))
        for _ in range(batch)
    )


# --- what it means -------------------------------------------------------------------------------------------------


def _seen(mask: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None) -> torch.Tensor:
    """Which key each query sees, bool `[B or 1, H or 1, S, T]`, pair by pair; the last query stands at the last key."""
    seen = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    for i in range(queries):
        at = i + keys - queries
        for j in range(keys):
            near = window is None or (at - j < window and (causal or j - at < window))
            seen[0, 0, i, j] = near and (j <= at or not causal)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & (mask[:, None, None, :] if mask.dim() == 2 else mask)
    return seen


def _weighted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax over the keys that are seen, head by head: query head h reads KV head h // (H / K)."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    seen = seen.expand(batch, heads, queries, k.shape[2])
    out = q.new_zeros(batch, heads, queries, v.shape[3])
    for head in range(heads):
        logits = torch.einsum("bsd,btd->bst", q[:, head], k[:, head // group]) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias.expand(batch, heads, -1, -1)[:, head]
        logits = logits.masked_fill(~seen[:, head], -torch.inf)
        weights = logits.exp() if sinks is None else (logits - sinks[head]).exp()
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else 1)
        out[:, head] = torch.einsum("bst,bte->bse", weights / total, v[:, head // group])
    return out


def _attention_reference(
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
    seen = _seen(mask, q.shape[2], k.shape[2], causal, window)
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    return _weighted(q, k, v, seen, bias, sinks, scale, softcap)


def _mask_reference(
    anchor: torch.Tensor, padding: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None
) -> torch.Tensor:
    return _seen(padding, queries, keys, causal, window)


def _rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain_in_float: bool) -> torch.Tensor:
    normed = x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return normed if weight is None else normed * weight


def _rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair of features as a complex number, times a unit one."""
    width = cos.shape[-1]
    one, two = (
        (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(width // 2), slice(width // 2, width))
    )
    turned = torch.complex(x[..., one], x[..., two]) * torch.complex(cos[..., one], sin[..., one])
    out = x.clone()
    out[..., one], out[..., two] = turned.real, turned.imag
    return out


def _cached_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    spans: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Row by row: committed entries and ancestors, gathered; a bias speaks of the key's position."""
    rows = []
    count = q.shape[2]
    for row, held in enumerate(lengths.tolist()):
        keys[row, :, held : held + count], values[row, :, held : held + count] = k[row], v[row]
        entry, left = spans[row if spans.shape[0] > 1 else 0].tolist()
        places = [*range(held), *positions[row].tolist()]
        seen = torch.zeros(1, 1, count, held + count, dtype=torch.bool)
        for i in range(count):
            for j, place in enumerate(places):
                near = window is None or int(positions[row, i]) - place < window
                seen[0, 0, i, j] = near and (j < held or entry[j - held] <= entry[i] < left[j - held])
        bias = None if mask is None else mask[..., places]
        k_row, v_row = keys[row : row + 1, :, : held + count], values[row : row + 1, :, : held + count]
        rows.append(_weighted(q[row : row + 1], k_row, v_row, seen, bias, sinks, scale, softcap))
    return torch.cat(rows)


LAYERS = (
    Contract(attention, _attention_samples, _attention_reference),
    Contract(attention_mask, _mask_samples, _mask_reference),
    Contract(cached_attention, _cached_samples, _cached_reference, writes=(3, 4)),
    Contract(rms_norm, _rms_norm_samples, _rms_norm_reference),
    Contract(rotary, _rotary_samples, _rotary_reference),
)
