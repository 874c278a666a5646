"""Caches that take in the admitted tokens alone: which those are, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Admitted:
    """The buffers of the attentions that one predictor decides for, by the common beginnings of their names.

    The first of `stems` has the buffer `{stem}_held_places` `[B, 1, A]` and the result `{stem}_new_admit` `[B, S]`; each has
    `{stem}_held_keys` and `_values` `[B, K, A, ..]` and the results `{stem}_new_keys` and `_values`.
    """

    stems: tuple[str, ...]
    heavy: bool = False

    @property
    def stem(self) -> str:
        """What the names of its results begin with."""
        return self.stems[0]

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of all buffers, which are equally long."""
        own = [f"{stem}_held_{kind}" for stem in self.stems for kind in ("keys", "values")]
        return (f"{self.stem}_held_places", *own)

    def need(self, buffers: Tensors, results: Tensors, lengths: torch.Tensor, path: torch.Tensor) -> int:
        """How many entries there must be room for when the path is taken in."""
        taken, _ = self._taken(results, lengths, path)
        return int(((buffers[f"{self.stem}_held_places"][:, 0] >= 0).sum(-1) + taken.sum(-1)).max())

    def absorb(self, buffers: Tensors, results: Tensors, lengths: torch.Tensor, path: torch.Tensor) -> None:
        """Take in what is admitted of the entries `path` `[B, N]` (-1 behind the last) behind `lengths` `[B]`, in place."""
        taken, path = self._taken(results, lengths, path)
        rows, steps = taken.nonzero(as_tuple=True)
        if not len(rows):
            return
        places = buffers[f"{self.stem}_held_places"]
        held = (places[:, 0] >= 0).sum(-1)
        slots = held[rows] + taken.cumsum(-1)[rows, steps] - 1
        places[rows, 0, slots] = lengths[rows] + steps
        source = path[rows, steps]
        for stem in self.stems:
            for kind in ("keys", "values"):
                buffer = buffers[f"{stem}_held_{kind}"]
                buffer[rows, :, slots] = results[f"{stem}_new_{kind}"][rows, :, source].to(buffer.dtype)

    def _taken(self, results: Tensors, lengths: torch.Tensor, path: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries of a path are admitted `[B, N]`, and the path, or all entries where those are no longer a text's."""
        admit = results[f"{self.stem}_new_admit"]
        if not bool(lengths.any()) and admit.shape[1] < path.shape[1]:
            path = torch.arange(admit.shape[1], device=path.device).expand(len(path), -1)
        return (admit.gather(1, path.clamp(min=0)) > 0) & (path >= 0), path

    def forget(self, buffers: Tensors, lengths: torch.Tensor) -> None:
        """Hold nothing of what stands behind the first `lengths` `[B]` tokens."""
        places = buffers[f"{self.stem}_held_places"]
        places.masked_fill_(places >= lengths[:, None, None], -1)

    def clear(self, buffers: Tensors) -> None:
        """Hold nothing."""
        buffers[f"{self.stem}_held_places"].fill_(-1)
