"""Training text: batch i is a function of i and the seed alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from graphopt.diagnostics import PlanError


@dataclass(frozen=True, eq=False)
class Windows:
    """Sequences of `seq` tokens of a text `[N]` in batches `[batch, seq]`.

    Each pass over the text cuts it at a new offset and takes the pieces in a new order. Raises PlanError when the text
    does not hold one batch.
    """

    tokens: torch.Tensor
    batch: int
    seq: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_epoch < 1:
            raise PlanError.of(
                "text_too_short",
                f"the text of {len(self.tokens)} tokens does not hold a batch of {self.batch} sequences of {self.seq}",
                help=("train on smaller batches or shorter sequences, or give more text",),
            )

    @property
    def per_epoch(self) -> int:
        """Batches in one pass over the text."""
        return (len(self.tokens) // self.seq - 1) // self.batch

    def __getitem__(self, index: int) -> torch.Tensor:
        """Batch `index` `[batch, seq]`."""
        epoch, place = divmod(index, self.per_epoch)
        starts = _starts(len(self.tokens), self.seq, self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        return torch.stack([self.tokens[start : start + self.seq] for start in starts.tolist()])


@lru_cache(maxsize=4)
def _starts(length: int, seq: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    offset = int(torch.randint(seq, (), generator=generator))
    pieces = (length - offset) // seq
    return offset + seq * torch.randperm(pieces, generator=generator)
