"""Attention over a cache: new keys and values are written into static buffers, queries see committed and new entries.

Prefill, one decoded token and the verification of a token tree are the same op with different `lengths`, `positions`
and `spans`. Shapes: B rows, H query heads, K KV heads (K divides H), S new tokens, C slots of a buffer, D and E head
sizes of keys and values.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.ops.library import LIBRARY, scaled_attention
from graphopt.ops.trees import is_straight, sees, straight

_sdpa = torch._C._nn.scaled_dot_product_attention


class Slots:
    """Where the new tokens of a call are written and what they see; one object serves all layers of a step.

    `lengths` `[B]` counts committed entries and `count` is S. `positions` `[B, S]` are the new tokens' logical ones
    (None: their slots), `spans` `[B or 1, 2, S]` says when a walk of their tree enters and leaves them, and so which see
    which (None: ordinary text, each sees those before it and itself). Raises ValueError when a row does not fit into
    `capacity` slots.
    """

    def __init__(
        self,
        lengths: torch.Tensor,
        count: int,
        capacity: int,
        positions: torch.Tensor | None = None,
        spans: torch.Tensor | None = None,
    ) -> None:
        self.lengths, self.count, self._spans = lengths, count, spans
        held: list[int] = lengths.tolist()
        self.used = max(held) + count
        if self.used > capacity or min(held) < 0:
            raise ValueError(f"{max(held)} entries and {count} new ones do not fit a cache of {capacity}")
        self.start = held[0] if held.count(held[0]) == len(held) else None
        self._visible: dict[int | None, torch.Tensor | None] = {}
        self._biases: dict[tuple[int | None, torch.dtype], torch.Tensor | None] = {}
        self._at: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        self._positions = positions
        self._straight: bool | None = True if positions is None else None
        self.held: tuple[torch.Tensor, ...] = ()
        """what the caches behind each stage at which tokens leave hold"""
        self._behind: dict[tuple[int, int], Slots] = {}

    @cached_property
    def chain(self) -> bool:
        """Whether the new tokens stand one behind the other."""
        return self._spans is None or self.count == 1 or is_straight(self._spans)

    @property
    def positions(self) -> torch.Tensor:
        """Logical positions of the new tokens `[B, S]`."""
        return self.at if self._positions is None else self._positions

    @property
    def spans(self) -> torch.Tensor:
        """When the new tokens are entered and left in a walk of their tree, `[B or 1, 2, S]`."""
        if self._spans is None:
            self._spans = straight(self.count, self.lengths.device)
        return self._spans

    def behind(self, stage: int, count: int, capacity: int) -> Slots:
        """The slots of caches that hold what has not left by a stage, of which `count` new tokens have come that far."""
        if (stage, count) not in self._behind:
            spans = self._spans if count == self.count else None
            self._behind[stage, count] = Slots(self.held[stage - 1], count, capacity, None, spans)
        return self._behind[stage, count]

    @property
    def causal(self) -> bool:
        """Whether this is a plain prefill of equal rows, which needs no mask tensor."""
        return self.start == 0 and self.count > 1 and self.chain

    @property
    def at(self) -> torch.Tensor:
        """Slots of the new tokens `[B, S]`."""
        if self._at is None:
            steps = torch.arange(self.count, device=self.lengths.device)
            self._at = self.lengths[:, None] + steps
        return self._at

    @property
    def straight(self) -> bool:
        """Whether every new token's position is its slot, as in ordinary text."""
        if self._straight is None:
            self._straight = bool((self.positions == self.at).all())
        return self._straight

    @property
    def places(self) -> torch.Tensor:
        """Logical positions of the used slots `[B or 1, used]`: a committed slot's is its index."""
        if self._places is None:
            columns = torch.arange(self.used, device=self.lengths.device)[None]
            if self.straight:
                self._places = columns
            else:
                self._places = columns.expand(self.lengths.shape[0], -1).scatter(1, self.at, self.positions)
        return self._places

    def visible(self, window: int | None) -> torch.Tensor | None:
        """Which used slots each new token sees, bool `[B or 1, 1, S, used]`; None when it sees all of them."""
        if window is not None and self.straight and self.used <= window:
            window = None
        if window not in self._visible:
            self._visible[window] = self._see(window)
        return self._visible[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What `visible` says as a bias of logits, made once for all layers: kernels make one of it in each call."""
        key = (window, dtype)
        if key not in self._biases:
            visible = self.visible(window)
            if visible is not None:
                visible = torch.zeros((), dtype=dtype, device=visible.device).where(visible, float("-inf"))
            self._biases[key] = visible
        return self._biases[key]

    def _see(self, window: int | None) -> torch.Tensor | None:
        if self.count == 1 and self.start is not None:
            if window is None:
                return None
            recent: torch.Tensor = self.places > self.positions - window
            return recent[:, None, None]
        if self.start is not None and window is None:
            # New tokens stand in the last columns of all rows; everything before them is seen.
            return F.pad(sees(self.spans), (self.start, 0), value=True)[:, None]
        columns = torch.arange(self.used, device=self.lengths.device)
        offset = columns - self.lengths[:, None]
        new = (offset >= 0) & (offset < self.count)
        spans = self.spans.expand(self.lengths.shape[0], -1, -1)
        index = offset.clamp(0, self.count - 1)
        entry, left = spans[:, 0].gather(1, index)[:, None], spans[:, 1].gather(1, index)[:, None]
        own = spans[:, 0, :, None]
        seen: torch.Tensor = (entry <= own) & (own < left) & new[:, None]
        seen = seen | (offset < 0)[:, None]
        if window is not None:
            seen = seen & (self.places[:, None, :] > self.positions[:, :, None] - window)
        return seen[:, None]

    def write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Put new entries `[B, K, S, D]` into their slots of `[B, K, C, D]`."""
        if self.start is not None:
            buffer.narrow(2, self.start, self.count).copy_(new)
            return
        index = self.at[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        buffer.scatter_(2, index, new.to(buffer.dtype))

    def columns(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask whose last axis counts key positions, with its last axis turned to the used slots."""
        if mask.shape[-1] == 1:
            return mask
        if self.straight:
            return mask[..., : self.used]
        rows, (_, heads, queries, _) = self.places.shape[0], mask.shape
        index = self.places[:, None, None].expand(-1, heads, queries, -1)
        return mask.expand(rows, -1, -1, -1).gather(3, index)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: Slots,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """What `cached_attention` computes, with the slots of the step already worked out."""
    slots.write(keys, k)
    slots.write(values, v)
    if slots.causal and mask is None and sinks is None and softcap is None and (window is None or slots.used <= window):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    held, gain = keys.narrow(2, 0, slots.used), values.narrow(2, 0, slots.used)
    if held.dtype != q.dtype:
        held, gain = held.to(q.dtype), gain.to(q.dtype)
    if mask is sinks is softcap is None:
        bias = slots.bias(window, q.dtype)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, held, gain, attn_mask=bias, scale=scale, enable_gqa=grouped)
    visible = slots.visible(window)
    if mask is not None:
        mask = slots.columns(mask)
        if visible is None:
            visible = mask
        elif mask.dtype == torch.bool:
            visible = visible & mask
        else:
            visible = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return scaled_attention(q, held, gain, visible, sinks, scale, False, None, softcap)


def attend_behind(stage: int, q: torch.Tensor, *rest: Any) -> torch.Tensor:
    """`attend` where the cache holds what has not left by a stage."""
    k, v, keys, values, slots, *others = rest
    return attend(q, k, v, keys, values, slots.behind(stage, q.shape[2], keys.shape[2]), *others)


def attend_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: Slots,
    scale: float,
) -> torch.Tensor:
    """`attend` for one new token in rows of equal length, with nothing hidden: as few calls as there can be."""
    used = slots.used
    keys.narrow(2, used - 1, 1).copy_(k)
    values.narrow(2, used - 1, 1).copy_(v)
    rows, heads, _, size = q.shape
    if heads == keys.shape[1]:
        return _sdpa(q, keys.narrow(2, 0, used), values.narrow(2, 0, used), scale=scale)
    # The query heads that share a KV head are so many queries of it.
    shared = q.reshape(rows, keys.shape[1], heads // keys.shape[1], size)
    result = _sdpa(shared, keys.narrow(2, 0, used), values.narrow(2, 0, used), scale=scale)
    return result.reshape(rows, heads, 1, values.shape[3])


def _cached_attention(
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
    """Causal attention of S new tokens over a cache, q `[B, H, S, D]`, k `[B, K, S, D]`, v `[B, K, S, E]` to `[B, H, S, E]`.

    Row b's new entries go to slots lengths[b] .. lengths[b] + S - 1 of `keys` `[B, K, C, D]` and `values`
    `[B, K, C, E]`, in place. Query i sees the slots below lengths[b] and new token j where the walk that `spans`
    `[B or 1, 2, S]` tells of (`graphopt.ops.trees`) is inside of j when it enters i; `window` counts positions, where a
    committed slot's is its index and a new token's is
    `positions` `[B, S]`. `mask` `[B or 1, 1 or H, S, C]` (bool visibility or additive bias) speaks of key positions.
    """
    slots = Slots(lengths, q.shape[2], keys.shape[2], positions, spans)
    return attend(q, k, v, keys, values, slots, mask, sinks, scale, window, softcap)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _differentiable(*arguments: Any) -> torch.Tensor:
    """Under autograd the reference runs as the ordinary operations that it is made of."""
    if isinstance(arguments[0], FakeTensor) or not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            result: torch.Tensor = cached_attention(*arguments)
            return result
    return _cached_attention(*arguments)


LIBRARY.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, "
    "Tensor positions, Tensor spans, Tensor? mask, Tensor? sinks, float scale, int? window, float? softcap) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("cached_attention", _cached_attention, "CompositeExplicitAutograd")
LIBRARY.impl("cached_attention", _differentiable, "Autograd")
torch.library.register_fake("graphopt::cached_attention", _fake, lib=LIBRARY)
cached_attention = torch.ops.graphopt.cached_attention.default
