"""The cache of a decoding run: static buffers that the graph writes in place, and how much of them counts."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program, specialise


class Cache:
    """Buffers of one batch, in the order of the program's cache inputs, and the entries that each row holds.

    `buffers[name]` is `[B, K, C, D]`; `lengths` `[B]` counts committed entries. A step of the program writes behind
    them; `commit` keeps what was written. Raises PlanError for a program without a cache.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        shared: Cache | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs rows and slots, not {batch} and {capacity}")
        self.batch, self.capacity = batch, capacity
        self.buffers: dict[str, torch.Tensor] = {}
        for spec in program.entry.inputs:
            if spec.role == "cache":
                heads, size = (n for n in spec.shape if isinstance(n, int))
                kind = specialise(spec.dtype, model=program.dtype, target=dtype, device=device)
                self.buffers[spec.name] = (
                    torch.zeros(batch, heads, capacity, size, dtype=kind, device=device)
                    if shared is None
                    else shared.buffers[spec.name]
                )
        if not self.buffers:
            raise PlanError.of("no_cache", "the program has no cache", help=("apply insert_cache to it first",))
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        # What the decoder works out once for a text: arguments of its two forms, and tables by place.
        self.text: list[Any] = []
        self.other: list[Any] = []
        self.tables: list[torch.Tensor] = []

    def commit(self, kept: int | torch.Tensor) -> None:
        """Keep entries that the last step wrote: the first `kept` of each row (a number or `[B]`), or those of a path.

        A path `[B, n]` lists nodes of a token tree, ancestors first; their entries move to the slots behind the
        committed ones. Rows whose path is shorter are filled with -1 at the end. Raises ValueError for what does not
        fit or is no path.
        """
        if isinstance(kept, int):
            self._raise(torch.full_like(self.lengths, kept))
        elif kept.dim() == 1:
            self._raise(kept.to(self.lengths))
        else:
            self._move(kept.to(self.lengths))

    def _move(self, path: torch.Tensor) -> None:
        count = (path >= 0).sum(-1)
        steps = torch.arange(path.shape[1], device=path.device)
        if bool((path.diff(dim=-1) <= 0).logical_and(path[:, 1:] >= 0).any()) or bool(
            (steps < count[:, None]).ne(path >= 0).any()
        ):
            raise ValueError("a path names nodes in rising order, and -1 only behind the last")
        if bool((torch.where(path >= 0, path, steps) == steps).all()):
            self._raise(count)
            return
        source = (self.lengths[:, None] + torch.where(path >= 0, path, steps)).clamp(max=self.capacity - 1)
        target = (self.lengths[:, None] + steps).clamp(max=self.capacity - 1)
        for buffer in self.buffers.values():
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            moved = buffer.gather(2, source[:, None, :, None].expand(shape))
            buffer.scatter_(2, target[:, None, :, None].expand(shape), moved)
        self._raise(count)

    def _raise(self, counts: torch.Tensor) -> None:
        longest = int((self.lengths + counts).max())
        if longest > self.capacity or int(counts.min()) < 0:
            raise ValueError(f"{longest} entries do not fit a cache of {self.capacity}")
        self.lengths = self.lengths + counts

    def truncate(self, lengths: int | torch.Tensor) -> None:
        """Forget entries: rows keep the first `lengths` (a number or `[B]`) of what they hold."""
        wanted = torch.full_like(self.lengths, lengths) if isinstance(lengths, int) else lengths.to(self.lengths)
        if bool((wanted > self.lengths).any()) or bool((wanted < 0).any()):
            raise ValueError(f"rows hold {self.lengths.tolist()} entries, and cannot be cut to {wanted.tolist()}")
        self.lengths = wanted.clone()

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue what row `rows[i]` held."""
        for buffer in self.buffers.values():
            buffer.copy_(buffer[rows])
        self.lengths = self.lengths[rows]

    def bytes(self) -> int:
        """Bytes of all buffers, as they lie in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())
