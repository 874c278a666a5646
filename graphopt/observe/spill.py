"""Activations between two segments of a stream: in memory while they fit, the rest in a file.

Storages are written whole and tensors come back with the strides they had, because products over another memory layout
round otherwise.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Values = dict[Any, Any]


@dataclass(frozen=True)
class _Frozen:
    """Values whose tensors lie in the file: `offset` of each storage, and for each tensor its place in one."""

    others: Mapping[Any, Any]
    storages: tuple[tuple[int, int], ...]
    tensors: Mapping[Any, tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...], int]]


class Spill:
    """Keeps the values of one batch after another; of all of them at most `limit` bytes stay in memory."""

    def __init__(self, limit: int | None, directory: Path | None, batches: int) -> None:
        self.limit, self.batches = limit, max(1, batches)
        self.written = 0
        self._directory = directory
        self._file: int | None = None
        self._slots: dict[int, tuple[int, int]] = {}
        self._end = 0

    def put(self, batch: int, values: Values) -> Values | _Frozen:
        """Keep the values of a batch; every batch has an equal share of the memory."""
        storages = _storages(values)
        if self.limit is None or sum(storage.nbytes() for storage in storages.values()) <= self.limit // self.batches:
            return values
        needed = sum(storage.nbytes() for storage in storages.values())
        start = self._slot(batch, needed)
        order: dict[int, int] = {}
        places: list[tuple[int, int]] = []
        for pointer, storage in storages.items():
            order[pointer] = len(places)
            places.append((start, storage.nbytes()))
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
            done = 0
            while done < len(data):
                done += os.pwrite(self._open(), data[done:], start + done)
            start += storage.nbytes()
        self.written += needed
        tensors = {
            key: (order[_pointer(value)], value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
            for key, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        others = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
        return _Frozen(others, tuple(places), tensors)

    def get(self, kept: Values | _Frozen) -> Values:
        """The values again."""
        if not isinstance(kept, _Frozen):
            return kept
        storages = []
        for start, size in kept.storages:
            buffer = torch.empty(size, dtype=torch.uint8)
            view, done = memoryview(buffer.numpy()), 0
            while done < size:
                got = os.preadv(self._open(), [view[done:]], start + done)
                if got == 0:
                    raise OSError("the file of spilled activations ends too early")
                done += got
            storages.append(buffer.untyped_storage())
        found = dict(kept.others)
        for key, (number, dtype, shape, stride, offset) in kept.tensors.items():
            found[key] = torch.empty(0, dtype=dtype).set_(storages[number], offset, shape, stride)
        return found

    def _open(self) -> int:
        if self._file is None:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
            self._file, name = tempfile.mkstemp(prefix=".graphopt-spill-", dir=self._directory)
            # Without a name the file goes with the process, however that ends.
            os.unlink(name)
            weakref.finalize(self, os.close, self._file)
        return self._file

    def _slot(self, batch: int, size: int) -> int:
        """Where a batch's values go: over its last ones when they fit."""
        start, room = self._slots.get(batch, (0, -1))
        if size > room:
            start, self._end = self._end, self._end + size
            self._slots[batch] = (start, size)
        return start


def held(values: Values) -> int:
    """Bytes of all storages behind some values."""
    return sum(storage.nbytes() for storage in _storages(values).values())


def _storages(values: Values) -> dict[int, torch.UntypedStorage]:
    return {_pointer(value): value.untyped_storage() for value in values.values() if isinstance(value, torch.Tensor)}


def _pointer(value: torch.Tensor) -> int:
    return int(value.untyped_storage().data_ptr())
