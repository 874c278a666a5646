"""A program with a cache, ready to decode: prefill, single tokens and token trees are calls of one step."""

from __future__ import annotations

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.run import Runner
from graphopt.runtime.cache import Cache


class Decoder:
    """Runs the steps of a program with a cache; the cache is the caller's."""

    def __init__(
        self, program: Program, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.program, self.dtype, self.device = program, dtype, device
        self.names = {spec.role: spec.name for spec in program.entry.inputs}
        if "lengths" not in self.names:
            raise PlanError.of("no_cache", "the program has no cache", help=("apply insert_cache to it first",))
        self.run = Runner(program, dtype, device)

    def cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` entries."""
        return Cache(self.program, batch, capacity, self.dtype, self.device)

    def step(
        self, cache: Cache, tokens: torch.Tensor, *, ancestors: torch.Tensor | None = None, **context: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Results of new tokens `[B, S]` behind what the cache holds; their entries are written, not yet committed.

        `ancestors` `[B or 1, S, S]` (bool, itself included) makes the tokens a tree: token i sees token j where it is
        true at [i, j], and stands as deep as it has ancestors. `context` are the program's other inputs.
        """
        count = tokens.shape[1]
        seen = torch.ones(1, count, count, dtype=torch.bool).tril() if ancestors is None else ancestors
        positions = cache.lengths[:, None] + (seen.sum(-1) - 1)
        names = self.names
        given = {
            names["tokens"]: tokens,
            names["positions"]: positions,
            names["lengths"]: cache.lengths,
            names["ancestors"]: seen,
        }
        return self.run(**given, **cache.buffers, **context)
