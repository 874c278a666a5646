"""Contracts of the ops that choose tokens."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from graphopt.ops import (
    admit_tokens,
    merge_tokens,
    merge_windows,
    pair_scores,
    put_tokens,
    random_scores,
    received_attention,
    similarity_scores,
    take_tokens,
    token_index,
    top_tokens,
    window_scores,
)
from graphopt.testing.contracts.contract import LENGTHS, Contract, Numbers, Sample

BATCHES = st.integers(1, 3)
# In three dimensions no two random directions are as near to a third one as rounding is.
WIDTHS = st.sampled_from((4, 3, 7, 64))


# --- what may be asked ---------------------------------------------------------------------------------------------


def _some(random: Numbers, *sizes: int) -> torch.Tensor:
    """A mask that is true at about two of three places."""
    return random(*sizes, dtype=torch.float32) > -0.4


def _top_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length = draw(BATCHES), draw(st.sampled_from(LENGTHS))
        # Rounded numbers are equal here and there.
        score = random(batch, length).mul(2).round() if draw(st.booleans()) else random(batch, length)
        keep = draw(st.lists(st.integers(0, length + 1), min_size=batch, max_size=batch))
        return Sample((score, _some(random, batch, length), torch.tensor(keep)))

    return samples()


def _admit_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        return Sample((Numbers(draw, dtype)(draw(BATCHES), draw(st.sampled_from(LENGTHS))),))

    return samples()


def _index_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        keep = _some(random, draw(BATCHES), draw(st.sampled_from(LENGTHS)))
        return Sample((keep, draw(st.integers(int(keep.sum(-1).max()), keep.shape[1]))))

    return samples()


def _take_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length, places = draw(BATCHES), draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(LENGTHS))
        rest = draw(st.lists(st.integers(1, 3), max_size=2))
        axis = draw(st.integers(1, 1 + len(rest)))
        rows = draw(st.sampled_from((batch, 1)))
        x = random(rows, *rest[: axis - 1], length, *rest[axis - 1 :])
        index = torch.randint(length, (batch, places), generator=random.generator)
        return Sample((x, index, axis))

    return samples()


def _put_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length = draw(BATCHES), draw(st.sampled_from(LENGTHS))
        places = draw(st.integers(1, length))
        rest = draw(st.lists(st.integers(1, 3), max_size=2))
        axis = draw(st.integers(1, 1 + len(rest)))
        # As top_tokens and token_index leave it: no token twice in a row, in any order that a later choice made.
        order = torch.rand(batch, length, generator=random.generator).argsort(-1)[:, :places].contiguous()
        x = random(batch, *rest[: axis - 1], places, *rest[axis - 1 :])
        return Sample((x, order, _some(random, batch, places), _some(random, batch, length), axis))

    return samples()


def _merge_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length = draw(BATCHES), draw(st.sampled_from(LENGTHS))
        target = _some(random, batch, length)
        return Sample((random(batch, length, draw(WIDTHS)), target, ~target & _some(random, batch, length)))

    return samples()


def _pair_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length = draw(BATCHES), draw(st.sampled_from(LENGTHS))
        span = _some(random, batch, length)
        # Outside the span a score has no meaning.
        return Sample((random(batch, length, draw(WIDTHS)), span), span)

    return samples()


def _window_samples(dtype: torch.dtype, merged: bool) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        front, behind = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        x = random(draw(BATCHES), front + rows * columns + behind, draw(WIDTHS))
        grid = (front, rows, columns, draw(st.integers(1, 3)))
        if not merged:
            return Sample((x, *grid))
        # The first token of a window takes the others in and does not leave.
        gone = _some(random, *x.shape[:2])
        for token in range(x.shape[1]):
            place = token - front
            if 0 <= place < rows * columns and _owner(place, columns, grid[3]) == place:
                gone[:, token] = False
        return Sample((x, gone, *grid))

    return samples()


def _received_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, kv_heads, size = draw(BATCHES), draw(st.integers(1, 3)), draw(st.sampled_from((2, 1, 3, 8)))
        heads = kv_heads * draw(st.integers(1, 3))
        queries = draw(st.sampled_from(LENGTHS))
        keys = queries + draw(st.sampled_from((0, 0, 1, 6)))
        causal = draw(st.booleans())
        kind = draw(st.sampled_from(("none", "padding", "bool", "bias")))
        mask: torch.Tensor | None = None
        if kind == "padding":
            mask = torch.ones(batch, keys, dtype=torch.bool)
            mask[-1, : draw(st.integers(0, keys - 1))] = False
        elif kind != "none":
            of = draw(st.sampled_from(((batch, heads), (1, 1), (batch, 1))))
            mask = random(*of, queries, keys)
            mask = mask > -0.5 if kind == "bool" else mask
        seen = _visible(mask, queries, keys, causal).any(-1).all(1).expand(batch, queries)
        # A query that sees nothing has nothing to give, so that nobody asks what it gave.
        rows = seen & _some(random, batch, queries) if draw(st.booleans()) or not bool(seen.all()) else None
        q, k = random(batch, heads, queries, size), random(batch, kv_heads, keys, size)
        return Sample((q, k, mask, rows, size**-0.5, causal, draw(st.sampled_from((None, 2.0)))))

    return samples()


def _similarity_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        batch, length = draw(BATCHES), draw(st.sampled_from(LENGTHS))
        return Sample((random(batch, length, draw(WIDTHS)), _some(random, batch, length)))

    return samples()


def _random_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        length = draw(st.sampled_from((*LENGTHS, 1024, 1025)))
        return Sample((torch.zeros(draw(BATCHES), length, dtype=dtype), draw(st.integers(0, 9))))

    return samples()


# --- what it means -------------------------------------------------------------------------------------------------


def _top_reference(score: torch.Tensor, span: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Row by row: a token stays when fewer than `keep` come before it, by score in float32 and then by place."""
    stays = torch.zeros_like(span)
    for row, most in enumerate(keep.tolist()):
        inside = span[row].nonzero().flatten().tolist()
        values = score[row].to(torch.float32).tolist()
        for token in sorted(inside, key=lambda i: (-values[i], i))[:most]:
            stays[row, token] = True
    return stays


def _admit_reference(score: torch.Tensor) -> torch.Tensor:
    return (score > 0).double()


def _index_reference(keep: torch.Tensor, places: int) -> torch.Tensor:
    rows = [[*row.nonzero().flatten().tolist(), *(~row).nonzero().flatten().tolist()][:places] for row in keep]
    return torch.tensor(rows, dtype=torch.int64).reshape(keep.shape[0], places)


def _take_reference(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    rows = []
    for row, tokens in enumerate(index.tolist()):
        one = x[row if x.shape[0] > 1 else 0]
        rows.append(torch.stack([one.select(axis - 1, token) for token in tokens], axis - 1))
    return torch.stack(rows)


def _put_reference(
    x: torch.Tensor, index: torch.Tensor, real: torch.Tensor, whole: torch.Tensor, axis: int
) -> torch.Tensor:
    out = x.new_zeros(*x.shape[:axis], whole.shape[1], *x.shape[axis + 1 :])
    for row, tokens in enumerate(index.tolist()):
        for place, token in enumerate(tokens):
            if bool(real[row, place]):
                out[row].select(axis - 1, token).copy_(x[row].select(axis - 1, place))
    return out


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    norms = float(one.norm()) * float(other.norm())
    return float(one @ other) / norms if norms else 0.0


def _merge_reference(x: torch.Tensor, target: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    for row in range(x.shape[0]):
        targets = target[row].nonzero().flatten().tolist()
        joined: dict[int, list[int]] = {token: [token] for token in targets}
        for token in gone[row].nonzero().flatten().tolist() if targets else []:
            joined[max(targets, key=lambda t: (_cosine(x[row, token], x[row, t]), -t))].append(token)
        for token, members in joined.items():
            out[row, token] = x[row, members].mean(0)
    return out


def _pair_reference(x: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    out = x.new_full(x.shape[:2], math.inf)
    for row in range(x.shape[0]):
        inside = span[row].nonzero().flatten().tolist()
        for token in inside[::2]:
            alike = [_cosine(x[row, token], x[row, other]) for other in inside[1::2]]
            out[row, token] = -max(alike, default=-math.inf)
    return out


def _owner(place: int, columns: int, window: int) -> int:
    """The first place of the window of a grid that a place lies in."""
    row, column = divmod(place, columns)
    return row // window * window * columns + column // window * window


def _windows(front: int, rows: int, columns: int, window: int) -> list[list[int]]:
    """The tokens of each window, its first one first."""
    found: dict[int, list[int]] = {}
    for place in range(rows * columns):
        found.setdefault(_owner(place, columns, window), []).append(front + place)
    return list(found.values())


def _window_reference(x: torch.Tensor, front: int, rows: int, columns: int, window: int) -> torch.Tensor:
    out = x.new_zeros(x.shape[:2])
    for row in range(x.shape[0]):
        for tokens in _windows(front, rows, columns, window):
            pairs = [_cosine(x[row, a], x[row, b]) for a in tokens for b in tokens if a != b]
            out[row, tokens] = -sum(pairs) / max(len(pairs), 1)
            out[row, tokens[0]] = math.inf
    return out


def _merged_windows_reference(
    x: torch.Tensor, gone: torch.Tensor, front: int, rows: int, columns: int, window: int
) -> torch.Tensor:
    out = x.clone()
    for row in range(x.shape[0]):
        for first, *others in _windows(front, rows, columns, window):
            out[row, first] = x[row, [first, *(token for token in others if bool(gone[row, token]))]].mean(0)
    return out


def _visible(mask: torch.Tensor | None, queries: int, keys: int, causal: bool) -> torch.Tensor:
    """Which key each query sees `[B or 1, H or 1, S, T]`; the last query stands at the last key."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        seen = seen.tril(keys - queries)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & (mask[:, None, None, :] if mask.dim() == 2 else mask)
    return seen


def _received_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> torch.Tensor:
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    seen = _visible(mask, queries, keys, causal).expand(batch, heads, queries, keys)
    out = q.new_zeros(batch, keys)
    for row in range(batch):
        asked = range(queries) if rows is None else rows[row].nonzero().flatten().tolist()
        for head in range(heads):
            logits = q[row, head] @ k[row, head * k.shape[1] // heads].T * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if mask is not None and mask.dtype != torch.bool:
                logits = logits + mask.expand(batch, heads, -1, -1)[row, head]
            for query in asked:
                weights = logits[query].masked_fill(~seen[row, head, query], -math.inf).exp()
                out[row] += weights / weights.sum() / (heads * len(asked))
    return out


def _similarity_reference(x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[:2])
    for row in range(x.shape[0]):
        mean = sum((one / one.norm() for one in x[row, guide[row]]), start=x.new_zeros(x.shape[2]))
        for token in range(x.shape[1]):
            out[row, token] = _cosine(x[row, token], mean)
    return out


def _random_reference(anchor: torch.Tensor, seed: int) -> torch.Tensor:
    """A place has its number whatever follows it: those of a longer text begin with those of a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.rand(1024, generator=generator) for _ in range(2)]
    return torch.stack([torch.cat(numbers)[: anchor.shape[1]]] * anchor.shape[0]).to(torch.float64)


TOKENS = (
    Contract(top_tokens, _top_samples, _top_reference),
    Contract(admit_tokens, _admit_samples, _admit_reference),
    Contract(token_index, _index_samples, _index_reference),
    Contract(take_tokens, _take_samples, _take_reference),
    Contract(put_tokens, _put_samples, _put_reference),
    Contract(merge_tokens, _merge_samples, _merge_reference),
    Contract(pair_scores, _pair_samples, _pair_reference),
    Contract(window_scores, lambda dtype: _window_samples(dtype, merged=False), _window_reference),
    Contract(merge_windows, lambda dtype: _window_samples(dtype, merged=True), _merged_windows_reference),
    Contract(received_attention, _received_samples, _received_reference),
    Contract(similarity_scores, _similarity_samples, _similarity_reference),
    Contract(random_scores, _random_samples, _random_reference),
)
