"""What bounded heads hold: how the entries of a step are taken in, and which go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ops import admitting_attention, heavy_weights, held_attention, packed_attention
from graphopt.ops.bounded import drop, held_places
from graphopt.runtime.admitted import Admitted
from graphopt.runtime.packed import Packed

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Held:
    """The buffers of one bounded attention, by the common beginning of their names, and its policy.

    Buffers are `{stem}_held_keys` and `_values` `[B, K, C, ..]`, for heavy hitters also `_places` and `_mass`
    `[B, K, C]`; what a step adds are the results `{stem}_new_keys`, `_values` and `_weights`.
    """

    stem: str
    sink: int
    recent: int
    compensate: bool
    heavy: bool

    @property
    def stems(self) -> tuple[str, ...]:
        """What the names of its results begin with."""
        return (self.stem,)

    def absorb(self, buffers: Tensors, results: Tensors, lengths: torch.Tensor, path: torch.Tensor) -> None:
        """Take in entries `path` `[B, N]` of the last step (-1 behind the last) behind `lengths` `[B]` tokens, in place.

        Raises ValueError for heavy hitters when the path is not the beginning of a text.
        """
        counts = (path >= 0).sum(-1)
        index = path.clamp(min=0)[:, None, :, None]
        new = {
            name: results[f"{self.stem}_new_{name}"].gather(
                2, index.expand(-1, *_beside(results[f"{self.stem}_new_{name}"], index.shape[2]))
            )
            for name in ("keys", "values")
        }
        if self.heavy:
            steps = torch.arange(path.shape[1], device=path.device)
            if bool(((path >= 0) & (path != steps)).any()):
                raise ValueError("heavy hitters are decided in the order of the text: no path of a tree can be kept")
            self._weigh(buffers, new, results[f"{self.stem}_new_weights"], lengths, counts)
            return
        size = self.sink + self.recent
        if self.compensate:
            self._mean(buffers, new, lengths, counts)
        places = held_places(lengths + counts, self.sink, self.recent)
        fresh = places >= lengths[:, None]
        source = (places - lengths[:, None]).clamp(0, path.shape[1] - 1)[:, None, :, None]
        for name, entries in new.items():
            buffer = buffers[f"{self.stem}_held_{name}"][:, :, :size]
            taken = entries.gather(2, source.expand(-1, entries.shape[1], -1, entries.shape[3]))
            buffer.copy_(torch.where(fresh[:, None, :, None], taken.to(buffer.dtype), buffer))

    def _mean(self, buffers: Tensors, new: Tensors, lengths: torch.Tensor, counts: torch.Tensor) -> None:
        """The last slot is the mean of everything that has gone, what goes now included."""
        size = self.sink + self.recent
        steps = torch.arange(new["keys"].shape[2], device=lengths.device)
        old = held_places(lengths, self.sink, self.recent)
        own = torch.where(steps < counts[:, None], lengths[:, None] + steps, -1)
        places = torch.cat([old, own], -1)
        goes = (places >= self.sink) & (places < (lengths + counts - self.recent)[:, None])
        before = (lengths - size).clamp(min=0)[:, None, None, None]
        number = before + goes.sum(-1)[:, None, None, None]
        for name, entries in new.items():
            buffer = buffers[f"{self.stem}_held_{name}"]
            both = torch.cat([buffer[:, :, :size], entries.to(buffer.dtype)], 2)
            total = both.masked_fill(~goes[:, None, :, None], 0).sum(2, keepdim=True)
            kept = buffer[:, :, size:].masked_fill(before == 0, 0)
            buffer[:, :, size:].copy_((kept * before + total) / number.clamp(min=1))

    def _weigh(
        self, buffers: Tensors, new: Tensors, weights: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Decide again, token by token, what the step decided on the way; survivors stay, new ones fill free slots."""
        places, mass = buffers[f"{self.stem}_held_places"], buffers[f"{self.stem}_held_mass"]
        size, count = places.shape[2], new["keys"].shape[2]
        steps = torch.arange(count, device=lengths.device)
        where = torch.cat([places, (lengths[:, None, None] + steps).expand(-1, places.shape[1], -1)], -1)
        alive = torch.cat([places >= 0, torch.zeros_like(where[..., size:], dtype=torch.bool)], -1)
        total = torch.cat([mass, mass.new_zeros(where[..., size:].shape)], -1)
        batch, kv_heads = places.shape[:2]
        received = weights.reshape(batch, kv_heads, -1, *weights.shape[2:]).sum(2)[..., : size + count]
        for i in range(count):
            row = (i < counts)[:, None, None]
            alive = alive | ((torch.arange(size + count, device=lengths.device) == size + i) & row)
            total = total + (received[:, :, i] * row).to(total.dtype)
            fewer = drop(total, alive, where, where[:, :1, size + i, None], self.sink, self.recent, size)
            alive = torch.where(row, fewer, alive)
        free = torch.argsort(alive[..., :size].to(torch.int8), dim=-1, stable=True)
        late = torch.argsort((~alive[..., size:]).to(torch.int8), dim=-1, stable=True)[..., :size]
        slots, late = free[..., : late.shape[-1]], late + size
        moves = alive.gather(-1, late) & ~alive.gather(-1, slots)
        source = torch.arange(size, device=lengths.device).expand(batch, kv_heads, -1).clone()
        source.scatter_(-1, slots, torch.where(moves, late, slots))
        lives = alive.gather(-1, source)
        places.copy_(torch.where(lives, where.gather(-1, source), -1))
        mass.copy_(torch.where(lives, total.gather(-1, source), 0))
        for name, entries in new.items():
            buffer = buffers[f"{self.stem}_held_{name}"]
            both = torch.cat([buffer, entries.to(buffer.dtype)], 2)
            buffer.copy_(both.gather(2, source[..., None].expand(-1, -1, -1, both.shape[3])))

    def clear(self, buffers: Tensors) -> None:
        """Hold nothing."""
        if self.heavy:
            buffers[f"{self.stem}_held_places"].fill_(-1)
            buffers[f"{self.stem}_held_mass"].zero_()


def held_of(program: Program) -> tuple[Held | Packed | Admitted, ...]:
    """The bounded, the quantised and the admitting attentions of a program with a cache, in graph order."""
    found: list[Held | Packed | Admitted] = []
    together: dict[fx.Node, list[str]] = {}
    for node in program.graph.graph.nodes:
        if node.target is held_attention:
            weights, (sink, recent, compensate) = node.args[8], node.args[13:16]
            heavy = isinstance(weights, fx.Node) and weights.target is heavy_weights
            if heavy:
                sink, recent = weights.args[10:12]
            stem = node.args[3].meta["input"].removesuffix("_held_keys")
            found.append(Held(stem, sink, recent, compensate, heavy))
        elif node.target is packed_attention:
            stem = node.args[3].meta["input"].removesuffix("_held_keys")
            found.append(Packed(stem, *node.args[17:19]))
        elif node.target is admitting_attention:
            together.setdefault(node.args[5], []).append(node.args[3].meta["input"].removesuffix("_held_keys"))
    return (*found, *(Admitted(tuple(stems)) for stems in together.values()))


def _beside(entries: torch.Tensor, count: int) -> tuple[int, int, int]:
    """Sizes of entries `[B, K, S, D]` without the batch, for `count` of them."""
    return entries.shape[1], count, entries.shape[3]
