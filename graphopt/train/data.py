"""Training data, a text or examples: batch i is a function of i and the seed alone, so that runs can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from graphopt.diagnostics import PlanError

ANSWERS = "answers"
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of a program by name, and the tokens `[B, S]` that are to be predicted, IGNORED where none is."""

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor


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

    def __len__(self) -> int:
        """Tokens of the text."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Batch `index` `[batch, seq]`."""
        epoch, place = divmod(index, self.per_epoch)
        starts = _starts(len(self.tokens), self.seq, self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        return torch.stack([self.tokens[start : start + self.seq] for start in starts.tolist()])


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of inputs by name, each `[N, ...]`, in batches; `answers` `[N, S]` marks the tokens that are to be predicted.

    Each pass takes the rows in a new order. Raises PlanError when the rows do not make one batch or do not fit together.
    """

    rows: Mapping[str, torch.Tensor]
    name: str
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: len(rows) for name, rows in self.rows.items()}
        if self.name not in counts or len(set(counts.values())) != 1 or len(self) < self.batch:
            raise PlanError.of(
                "examples",
                f"the examples do not make a batch of {self.batch} rows with {self.name}",
                notes=(", ".join(f"{name}: {count} rows" for name, count in counts.items()),),
            )

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows.get(self.name, ()))

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`."""
        epoch, place = divmod(index, len(self) // self.batch)
        chosen = _order(len(self), self.seed, epoch)[place * self.batch : (place + 1) * self.batch]
        inputs = {name: rows[chosen] for name, rows in self.rows.items() if name != ANSWERS}
        targets = inputs[self.name]
        if ANSWERS in self.rows:
            targets = targets.masked_fill(~self.rows[ANSWERS][chosen].to(torch.bool), IGNORED)
        return Batch(inputs, targets)


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


@lru_cache(maxsize=4)
def _starts(length: int, seq: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    offset = int(torch.randint(seq, (), generator=generator))
    pieces = (length - offset) // seq
    return offset + seq * torch.randperm(pieces, generator=generator)
