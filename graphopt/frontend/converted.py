"""A checkpoint whose tensors are named, split or stacked in another way than the model's: converted one by one when read.

What makes a tensor out of tensors on disk is given as a function; this file knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from graphopt.frontend.checkpoint import CheckpointSource

Make = Callable[[Mapping[str, list[torch.Tensor]]], dict[str, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of the model made together: `parts` names, by kind, the tensors on disk; `make` turns them into tensors.

    `stacks` says that kinds are lists and that row i of what is made depends on member i of each list alone.
    """

    parts: Mapping[str, tuple[str, ...]]
    make: Make
    stacks: bool = False

    @property
    def on_disk(self) -> tuple[str, ...]:
        """All tensors that are read."""
        return tuple(name for names in self.parts.values() for name in names)


class ConvertedSource(CheckpointSource):
    """A checkpoint seen through renamings (name in the model to name on disk) and conversions."""

    def __init__(
        self, plain: CheckpointSource, renamed: Mapping[str, str], conversions: tuple[Conversion, ...]
    ) -> None:
        super().__init__(plain.directory)
        self._renamed = dict(renamed)
        self._made: dict[str, Conversion] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for conversion in conversions:
            for name, value in conversion.make(self._empty(conversion)).items():
                self._made[name], self._shapes[name] = conversion, tuple(value.shape)
        self._convert = lru_cache(maxsize=1)(self._convert_all)

    @property
    def names(self) -> tuple[str, ...]:
        """Names as the model has them; tensors that it does not have keep their names on disk."""
        used = set(self._renamed.values()) | {n for c in self._made.values() for n in c.on_disk}
        return (*self._renamed, *self._made, *(n for n in super().names if n not in used))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers of what it is made of."""
        return self._shapes[name] if name in self._made else super().shape(self._on_disk(name))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as it is read."""
        return super().dtype(self._made[name].on_disk[0] if name in self._made else self._on_disk(name))

    def identity(self, name: str) -> str:
        """What tells a tensor's bytes from those of another or of a changed file."""
        if name not in self._made:
            return super().identity(self._on_disk(name))
        parts = " ".join(CheckpointSource.identity(self, part) for part in self._made[name].on_disk)
        return f"{name} of {parts}"

    def get(self, name: str) -> torch.Tensor:
        """Read and convert one tensor; raises as CheckpointSource.get does."""
        return self._convert(self._made[name])[name] if name in self._made else super().get(self._on_disk(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor; of a stack only the members asked for are read."""
        if name not in self._made:
            return super().rows(self._on_disk(name), start, stop)
        conversion = self._made[name]
        if not conversion.stacks:
            return self.get(name)[start:stop]
        return conversion.make(self._read(conversion, slice(start, stop)))[name]

    def _on_disk(self, name: str) -> str:
        return self._renamed.get(name, name)

    def _convert_all(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        return conversion.make(self._read(conversion, slice(None)))

    def _read(self, conversion: Conversion, members: slice) -> dict[str, list[torch.Tensor]]:
        get = super().get
        return {kind: [get(name) for name in names[members]] for kind, names in conversion.parts.items()}

    def _empty(self, conversion: Conversion) -> dict[str, list[torch.Tensor]]:
        shape, dtype = super().shape, super().dtype
        return {
            kind: [torch.empty(shape(name), dtype=dtype(name), device="meta") for name in names]
            for kind, names in conversion.parts.items()
        }
