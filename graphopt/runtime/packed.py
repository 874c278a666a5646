"""What a quantised cache holds: how the entries of a step are taken in, and which blocks become whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.ops.bounded import held_places
from graphopt.ops.packed import pack_keys, pack_values, tail

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """The buffers of one quantised attention, by the common beginning of their names, and its grid.

    Buffers are `{stem}_held_keys` and `_values` `[B, K, R, ..]`, a ring, and `{stem}_packed_keys`, `_values` and their
    scales and lowest values `[B, K, N, ..]`; what a step adds are the results `{stem}_new_keys` and `_values`.
    """

    stem: str
    bits: int
    group: int
    heavy: bool = False

    @property
    def stems(self) -> tuple[str, ...]:
        """What the names of its results begin with."""
        return (self.stem,)

    def absorb(self, buffers: Tensors, results: Tensors, lengths: torch.Tensor, path: torch.Tensor) -> None:
        """Take in entries `path` `[B, n]` of the last step (-1 behind the last) behind `lengths` `[B]` tokens, in place."""
        counts = (path >= 0).sum(-1)
        index = path.clamp(min=0)[:, None, :, None]
        for name, part, pack in (("keys", "key", pack_keys), ("values", "value", pack_values)):
            given, ring = results[f"{self.stem}_new_{name}"], buffers[f"{self.stem}_held_{name}"]
            new = given.gather(2, index.expand(-1, given.shape[1], -1, given.shape[3])).to(ring.dtype)
            first, behind = (lengths // self.group).tolist(), ((lengths + counts) // self.group).tolist()
            if first != behind:
                made = pack(tail(ring, new, lengths, self.group), self.bits, self.group)
                for kind, whole in zip((name, f"{part}_scale", f"{part}_low"), made, strict=True):
                    for row, (start, end) in enumerate(zip(first, behind, strict=True)):
                        buffers[f"{self.stem}_packed_{kind}"][row, :, start:end] = whole[row, :, : end - start]
            places = held_places(lengths + counts, 0, ring.shape[2])
            fresh = (places >= lengths[:, None])[:, None, :, None]
            source = (places - lengths[:, None]).clamp(0, path.shape[1] - 1)[:, None, :, None]
            ring.copy_(torch.where(fresh, new.gather(2, source.expand(-1, new.shape[1], -1, new.shape[3])), ring))

    def clear(self, buffers: Tensors) -> None:
        """Hold nothing: what lies behind the committed entries is not read."""
