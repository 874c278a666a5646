"""Choosing tokens: which stay, where they go, and how what was left out comes back. Shapes: B rows, S tokens, L places.

A choice is a mask `[B, S]`. Its fast form is an index `[B, L]` of the tokens that stay, in order, and behind them, in rows
that keep fewer than L, fillers: tokens that do not stay and that nobody may see.
"""

from __future__ import annotations

import torch

from graphopt.ops.bounded import grouped
from graphopt.ops.library import _define, _mask


def _top_tokens(score: torch.Tensor, span: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Of the tokens in `span` `[B, S]` the `keep` `[B]` with the largest `score` `[B, S]`, bool `[B, S]`.

    Of equal scores the earlier token stays.
    """
    # Ranks are those of float32: what differs by the order of sums alone is equal.
    wide = score.to(torch.float32)
    order = wide.masked_fill(~span, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(-1, order, places)
    return span & (rank < keep[:, None])


def _token_index(keep: torch.Tensor, places: int, everywhere: bool = False) -> torch.Tensor:
    """The tokens that `keep` `[B, S]` names, in order and then fillers, int `[B, places]`.

    `everywhere` changes nothing here: it says that tokens behind the prompt do not see those that leave in any layer, those
    in front of this stage included. Raises ValueError when a row keeps more tokens than there are places.
    """
    most = int(keep.sum(-1).max()) if keep.numel() else 0
    if most > places:
        row = int(keep.sum(-1).argmax())
        raise ValueError(
            f"row {row} keeps {most} of {keep.shape[-1]} tokens, but there are {places} places:"
            " give the rows of a batch the same number of pictures, or fill shorter ones up with padding"
        )
    return (~keep).to(torch.int8).argsort(dim=-1, stable=True)[:, :places].contiguous()


def _take_tokens(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Entries of `x` (`[B or 1, .., S, ..]`, tokens on `axis`) at `index` `[B, L]`."""
    rows = index.shape[0]
    x = x.expand(rows, *x.shape[1:])
    shape = [rows, *[1] * (x.dim() - 1)]
    shape[axis] = index.shape[1]
    sizes = list(x.shape)
    sizes[axis] = index.shape[1]
    return x.gather(axis, index.reshape(shape).expand(sizes))


def _put_tokens(
    x: torch.Tensor, index: torch.Tensor, real: torch.Tensor, whole: torch.Tensor, axis: int
) -> torch.Tensor:
    """The inverse of `take_tokens`: entries of `x` at their tokens of `whole` `[B, S]`, zero everywhere else.

    `real` `[B, L]` is false at fillers.
    """
    shape = [index.shape[0], *[1] * (x.dim() - 1)]
    shape[axis] = index.shape[1]
    sizes = list(x.shape)
    sizes[axis] = whole.shape[1]
    values = torch.where(real.reshape(shape), x, torch.zeros((), dtype=x.dtype, device=x.device))
    empty = torch.zeros(sizes, dtype=x.dtype, device=x.device)
    return empty.scatter(axis, index.reshape(shape).expand(x.shape), values)


def _merge_tokens(x: torch.Tensor, target: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """The stream `[B, S, d]` with each token of `gone` `[B, S]` averaged into the most similar one of `target` `[B, S]`.

    Similarity is the cosine (ToMe, arXiv 2210.09461). A token of `target` becomes the mean of itself and of those that
    chose it; rows without a target stay as they are.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1)
    alike = torch.matmul(unit, unit.transpose(-1, -2)).to(torch.float32).masked_fill(~target[:, None], -torch.inf)
    chosen = alike.argmax(-1)
    moved = (gone & target.any(-1, keepdim=True)).to(wide.dtype)
    total = wide.scatter_add(1, chosen[..., None].expand_as(wide), wide * moved[..., None])
    count = torch.ones_like(moved).scatter_add(1, chosen, moved)
    return torch.where(target[..., None], total / count[..., None], wide).to(x.dtype)


def _pair_scores(x: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """How unlike any other each token of `span` `[B, S]` is, `[B, S]`: the halves of bipartite matching (ToMe, 2210.09461).

    Every second token of the span has minus its largest cosine with one of the others between; those score infinity.
    """
    unit = torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    odd = span.to(torch.int64).cumsum(-1) % 2 == 1
    alike = torch.matmul(unit, unit.transpose(-1, -2)).masked_fill(~(span & ~odd)[:, None], -torch.inf)
    return (-alike.amax(-1)).masked_fill(~odd, torch.inf)


def _window_of(rows: int, columns: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The window of each place of a grid, and the first place of that window, both `[rows * columns]`."""
    row = torch.arange(rows)[:, None].expand(rows, columns).flatten()
    column = torch.arange(columns).repeat(rows)
    across = -(-columns // window)
    first = row // window * window * columns + column // window * window
    return row // window * across + column // window, first


def _window_scores(x: torch.Tensor, front: int, rows: int, columns: int, window: int) -> torch.Tensor:
    """How unlike each other the tokens of a window of the grid are, `[B, S]`; the first of each scores infinity.

    The grid of rows x columns begins behind `front` tokens. Unlike is minus the mean cosine of two tokens of a window
    (MustDrop, arXiv 2411.10803).
    """
    count = rows * columns
    owner, first = (found.to(x.device) for found in _window_of(rows, columns, window))
    wide = x[:, front : front + count].to(torch.promote_types(x.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1)
    groups = int(owner.max()) + 1
    sums = torch.zeros(x.shape[0], groups, x.shape[2], dtype=unit.dtype, device=x.device).index_add(1, owner, unit)
    sizes = torch.zeros(groups, dtype=unit.dtype, device=x.device).index_add(0, owner, torch.ones_like(unit[0, :, 0]))
    alike = (sums.square().sum(-1) - sizes) / (sizes * (sizes - 1)).clamp(min=1)
    own = (-alike[:, owner]).masked_fill(first == torch.arange(count, device=x.device), torch.inf)
    return torch.zeros(x.shape[:2], dtype=own.dtype, device=x.device).index_copy(
        1, torch.arange(front, front + count, device=x.device), own
    )


def _merge_windows(
    x: torch.Tensor, gone: torch.Tensor, front: int, rows: int, columns: int, window: int
) -> torch.Tensor:
    """The stream `[B, S, d]` with the first token of each window of a grid the mean of itself and those in `gone`."""
    count = rows * columns
    _, first = _window_of(rows, columns, window)
    places = (first + front).to(x.device)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    moved = gone[:, front : front + count].to(wide.dtype)
    total = wide.index_add(1, places, wide[:, front : front + count] * moved[..., None])
    number = torch.ones(x.shape[:2], dtype=wide.dtype, device=x.device).index_add(1, places, moved)
    return (total / number[..., None]).to(x.dtype)


def _received_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> torch.Tensor:
    """What each key gets of the attention of the queries that `rows` `[B, S]` names (all when None), float `[B, T]`.

    The mean over heads and over those queries. q `[B, H, S, D]`, k `[B, K, T, D]`; `mask` is padding `[B, T]`, visibility
    or an additive bias `[B or 1, 1 or H, S, T]`.
    """
    batch, heads, count, _ = q.shape
    logits = grouped(q, k).reshape(batch, heads, count, k.shape[2]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    low = torch.finfo(logits.dtype).min
    if causal or (mask is not None and mask.dim() == 2):
        padding = mask if mask is not None and mask.dim() == 2 else None
        logits = logits.masked_fill(~_mask(q, padding, count, k.shape[2], causal, None), low)
    if mask is not None and mask.dim() == 4:
        logits = logits.masked_fill(~mask, low) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    weights = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).mean(1)
    if rows is None:
        return weights.mean(1)
    share = rows.to(weights.dtype)
    share = share / share.sum(-1, keepdim=True).clamp(min=1)
    return (weights * share[..., None]).sum(1)


def _similarity_scores(x: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """The cosine of each token of `x` `[B, S, d]` with the mean direction of the tokens in `guide` `[B, S]`, `[B, S]`."""
    unit = torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
    mean = (unit * guide.to(unit.dtype)[..., None]).sum(1, keepdim=True)
    return (unit * torch.nn.functional.normalize(mean, dim=-1)).sum(-1)


def _random_scores(anchor: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers in 0..1 for the tokens of `anchor` `[B, S]`: equal for equal places and seeds, in every row."""
    generator = torch.Generator().manual_seed(seed)
    # The longest sequence is drawn in blocks, so that a place has one number however many places follow it.
    drawn = [torch.rand(1024, generator=generator) for _ in range(-(-anchor.shape[1] // 1024))]
    row = torch.cat(drawn)[: anchor.shape[1]] if drawn else torch.zeros(0)
    return row.to(anchor.device).expand(anchor.shape[0], -1).contiguous()


top_tokens = _define(
    "top_tokens(Tensor score, Tensor span, Tensor keep) -> Tensor",
    _top_tokens,
    lambda score, span, keep: torch.empty_like(span),
)
token_index = _define(
    "token_index(Tensor keep, SymInt places, bool everywhere=False) -> Tensor",
    _token_index,
    lambda keep, places, everywhere=False: keep.new_empty((keep.shape[0], places), dtype=torch.int64),
)


def _taken(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:axis], index.shape[1], *x.shape[axis + 1 :]))


def _put(x: torch.Tensor, index: torch.Tensor, real: torch.Tensor, whole: torch.Tensor, axis: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:axis], whole.shape[1], *x.shape[axis + 1 :]))


take_tokens = _define("take_tokens(Tensor x, Tensor index, int axis) -> Tensor", _take_tokens, _taken)
put_tokens = _define(
    "put_tokens(Tensor x, Tensor index, Tensor real, Tensor whole, int axis) -> Tensor", _put_tokens, _put
)
merge_tokens = _define(
    "merge_tokens(Tensor x, Tensor target, Tensor gone) -> Tensor",
    _merge_tokens,
    lambda x, target, gone: torch.empty_like(x),
)
pair_scores = _define(
    "pair_scores(Tensor x, Tensor span) -> Tensor",
    _pair_scores,
    lambda x, span: x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)),
)
window_scores = _define(
    "window_scores(Tensor x, int front, int rows, int columns, int window) -> Tensor",
    _window_scores,
    lambda x, front, rows, columns, window: x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)),
)
merge_windows = _define(
    "merge_windows(Tensor x, Tensor gone, int front, int rows, int columns, int window) -> Tensor",
    _merge_windows,
    lambda x, gone, front, rows, columns, window: torch.empty_like(x),
)
similarity_scores = _define(
    "similarity_scores(Tensor x, Tensor guide) -> Tensor",
    _similarity_scores,
    lambda x, guide: x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)),
)
received_attention = _define(
    "received_attention(Tensor q, Tensor k, Tensor? mask, Tensor? rows, float scale, bool causal, float? softcap) "
    "-> Tensor",
    _received_attention,
    lambda q, k, mask, rows, scale, causal, softcap: q.new_empty(
        (q.shape[0], k.shape[2]), dtype=torch.promote_types(q.dtype, torch.float32)
    ),
)
random_scores = _define(
    "random_scores(Tensor anchor, int seed) -> Tensor",
    _random_scores,
    lambda anchor, seed: anchor.new_empty((anchor.shape[0], anchor.shape[1]), dtype=torch.float32),
)
