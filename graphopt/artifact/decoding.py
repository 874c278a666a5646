"""Decoding with a cache under transformers' generate(): padding on the left there, rows from the left of our cache here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphopt.ir.program import Program
from graphopt.ir.weights import MemorySource
from graphopt.runtime import Cache, Decoder


class PastKeyValues:
    """Our cache as generate() carries it: `seen` counts a row's tokens with their padding."""

    is_compileable = False

    def __init__(self, cache: Cache) -> None:
        self.cache, self.seen = cache, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Tokens at most."""
        return self.cache.capacity

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue row `beam_idx[i]`."""
        self.cache.reorder(beam_idx)


class Pack:
    """Rows `[B, S]` with their padding put behind the real tokens, and the way back."""

    def __init__(self, mask: torch.Tensor | None, tokens: torch.Tensor) -> None:
        real = None if mask is None else mask[:, -tokens.shape[1] :].to(torch.bool)
        self.plain = real is None or bool(real.all())
        self.count = tokens.new_full((tokens.shape[0],), tokens.shape[1]) if real is None else real.sum(-1)
        self._order = None if real is None else real.to(torch.int8).argsort(dim=-1, descending=True, stable=True)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens from the left."""
        return tokens if self.plain or self._order is None else tokens.gather(1, self._order)

    def unpack(self, logits: torch.Tensor) -> torch.Tensor:
        """Results `[B, S, V]` where their tokens stood."""
        if self.plain or self._order is None:
            return logits
        back = self._order.argsort(dim=-1)
        return logits.gather(1, back[..., None].expand(-1, -1, logits.shape[-1]))


class Decoding:
    """The decoder of a model's own weights, made again when they have changed."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._made: Decoder | None = None
        self._mark: Any = None

    def decoder(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Decoder:
        """A decoder over the parameters as they are now."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        mark = (dtype, device, tuple((t.data_ptr(), t._version) for t in tensors.values()))
        if self._made is None or mark != self._mark:
            held = {name: tensor.detach() for name, tensor in tensors.items()}
            weights = replace(self.program.weights, source=MemorySource(held))
            self._made = Decoder(replace(self.program, weights=weights), dtype, device)
            self._mark = mark
        return self._made

    def step(
        self, past: PastKeyValues, decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Results of the first kind for new tokens `[B, S]`, which the cache then holds."""
        pack = Pack(mask, tokens)
        results = decoder.step(past.cache, pack.pack(tokens))
        past.cache.commit(tokens.shape[1] if pack.plain else pack.count)
        past.seen += tokens.shape[1]
        # What the decoder gives are inference tensors, which may not be changed in place outside of it.
        return pack.unpack(results[0]).clone()
