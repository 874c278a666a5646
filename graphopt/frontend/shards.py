"""One safetensors file, read with plain reads: rows of a tensor on demand, and nothing mapped into memory.

A mapped file counts as resident once it has been read, which would break a promise about memory.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.diagnostics import ArtifactError
from graphopt.frontend.direct import Reader

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Held:
    """A tensor in a file: its dtype by the format's name, its shape and the bytes that it takes, in the whole file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Shard:
    """A safetensors file whose header has been checked; `bytes_read` counts the tensor bytes that were read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        try:
            self._reader = Reader(path)
        except OSError as error:
            raise _damaged(path, str(error)) from error
        self._file = self._reader.file
        self.stamp = os.fstat(self._file)
        self.held = self._header()

    def identity(self, name: str) -> str:
        """What tells this tensor's bytes from those of another file, or of this one after it was changed."""
        held = self.held[name]
        return f"{self.path}:{self.stamp.st_size}:{self.stamp.st_mtime_ns}:{held.start}:{held.stop}"

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its rows `start` to `stop`; raises ArtifactError when the file cannot give it."""
        held = self.held[name]
        if held.kind not in DTYPES:
            raise ArtifactError.of(
                "dtype_not_read",
                f"tensor {name!r} in {self.path} is stored as {held.kind}",
                notes=(f"what can be read: {', '.join(DTYPES)}",),
            )
        dtype, shape, first, last = DTYPES[held.kind], held.shape, held.start, held.stop
        if start is not None and stop is not None:
            each = math.prod(shape[1:]) * dtype.itemsize
            first, last = first + start * each, first + stop * each
            shape = (stop - start, *shape[1:])
        try:
            data = self._reader.read(first, last, held.stop)
        except OSError as error:
            raise _damaged(self.path, str(error)) from error
        except EOFError as error:
            raise _damaged(self.path, f"it ends inside tensor {name!r}") from error
        self.bytes_read += last - first
        # A header of odd length puts values where no such type may lie.
        data = data if data.storage_offset() % dtype.itemsize == 0 else data.clone()
        return data.view(dtype).reshape(shape)

    def _header(self) -> dict[str, Held]:
        size = self.stamp.st_size
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise _damaged(self.path, f"it has {size} bytes and says that its header has {length}")
        try:
            raw = json.loads(os.pread(self._file, length, 8), object_pairs_hook=_once)
            raw.pop("__metadata__", None)
            held = {name: _entry(entry, 8 + length) for name, entry in raw.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(self.path, f"its header is no header: {error}") from error
        at = 8 + length
        for name, entry in sorted(held.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                raise _damaged(self.path, f"tensor {name!r} begins at byte {entry.start}, not at {at}")
            if entry.kind in DTYPES and entry.stop - at != math.prod(entry.shape) * DTYPES[entry.kind].itemsize:
                raise _damaged(self.path, f"tensor {name!r} has {entry.stop - at} bytes, which its shape does not need")
            at = entry.stop
        if at != size:
            raise _damaged(self.path, f"it has {size} bytes where its header needs {at}")
        return held


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(entry: Any, base: int) -> Held:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (start, stop, *shape))
    if not whole or stop < start or not isinstance(entry["dtype"], str):
        raise ValueError(f"{entry} describes no tensor")
    return Held(entry["dtype"], shape, base + start, base + stop)


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError.of(
        "unreadable_weights",
        f"{path} is not a whole safetensors file: {why}",
        help=("the file is damaged or truncated: copy it again",),
    )
