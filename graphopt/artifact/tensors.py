"""Safetensors written as a stream: some rows in memory at a time, sharded with an index above a size.

One thread computes and another hashes and writes, so that reading, computing and writing overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from graphopt.artifact.journal import Finished, Journal
from graphopt.diagnostics import ArtifactError
from graphopt.frontend import direct
from graphopt.frontend.shards import DTYPES
from graphopt.ir.weights import all_finite

# Small enough that the allocator hands the same pages out again: with 32 MiB every piece was mapped anew, and reading,
# checking, hashing and writing 1 GiB took 1.97 CPU seconds instead of 1.01.
PIECE = 4 << 20
_WAITING = 4 * PIECE
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its shape and dtype are known before `make` computes it.

    `pieces(size)` computes it in blocks of rows of about that many bytes; `key` says what it is made from, where that is
    known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    finite: bool = True
    pieces: Callable[[int], Iterator[torch.Tensor]] | None = None
    key: Callable[[], str | None] | None = None

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def write_sharded(
    directory: Path, stem: str, entries: Mapping[str, Entry], shard_size: int, journal: Journal | None = None
) -> None:
    """Write `stem.safetensors`, or shards of at most `shard_size` bytes (a larger tensor has its own) and their index.

    Files that `journal` holds with the same content stay. Raises ArtifactError when a value is not finite.
    """
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.bytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.bytes
    files: dict[str, str] = {}
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for stale in directory.glob(f"{stem}*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    for file, shard in zip(names, shards, strict=True):
        key = _key(shard) if journal is not None else None
        if journal is None or not journal.keeps(file, key):
            size, sha256 = write_file(directory / file, shard)
            if journal is not None and key is not None:
                journal.finished(Finished(file, key, size, sha256))
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(e.bytes for e in entries.values())}, "weight_map": files}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_file(path: Path, entries: Mapping[str, Entry]) -> tuple[int, str]:
    """Write one safetensors file, evaluating and checking some rows at a time; returns its size and SHA-256."""
    ordered = _ordered(entries)
    with _Writer(path) as writer:
        writer.add(_header(ordered))
        for name, entry in ordered:
            done = 0
            for piece in entry.pieces(PIECE) if entry.pieces is not None else iter((entry.make(),)):
                value = _checked(name, entry, piece)
                done += value.numel()
                if value.numel():
                    writer.add(value.reshape(-1).view(torch.uint8).numpy().data)
                del piece, value
            if done != math.prod(entry.shape):
                raise ArtifactError.of("wrong_shape", f"{name!r} has {done} values, not {list(entry.shape)}")
    return path.stat().st_size, writer.sha256


def _ordered(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    # The format wants every tensor aligned to its own itemsize, which falling sizes give.
    return sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _header(ordered: list[tuple[str, Entry]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in ordered:
        if entry.dtype not in _NAMES:
            raise ArtifactError.of("dtype_not_stored", f"safetensors cannot hold {name!r} as {entry.dtype}")
        span = [offset, offset := offset + entry.bytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _key(shard: Mapping[str, Entry]) -> str | None:
    made = hashlib.sha256(_header(_ordered(shard)))
    for name, entry in _ordered(shard):
        key = entry.key() if entry.key is not None else None
        if key is None:
            return None
        made.update(f"{name} {entry.finite} {key}\n".encode())
    return made.hexdigest()


def _checked(name: str, entry: Entry, piece: torch.Tensor) -> torch.Tensor:
    value = piece.detach().to("cpu", entry.dtype).contiguous()
    if tuple(value.shape[1:]) != entry.shape[1:] or value.dim() != len(entry.shape):
        raise ArtifactError.of("wrong_shape", f"{name!r} evaluates to {list(value.shape)}, not {list(entry.shape)}")
    if entry.finite and not all_finite(value):
        whole = entry.make().detach().to("cpu", entry.dtype).float()
        bad = int((~torch.isfinite(whole)).sum())
        raise ArtifactError.of(
            "not_finite",
            f"{name!r} has {bad} values of {whole.numel()} that are NaN or infinite in {value.dtype}",
            help=("nothing was written; find the step that made them",),
        )
    return value


class _Writer:
    """A thread that hashes and writes what it is given, in order; little waits at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = ""
        self._waiting: deque[Any] = deque()
        self._bytes = 0
        self._ended = self._dropped = False
        self._error: BaseException | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="graphopt-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._change:
            self._ended = True
            self._dropped = error is not None
            self._change.notify_all()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def add(self, data: Any) -> None:
        """Queue bytes; waits while much is queued, raises what writing raised."""
        size = memoryview(data).nbytes
        with self._change:
            while self._bytes and self._bytes + size > _WAITING and self._error is None:
                self._change.wait()
            if self._error is not None:
                raise self._error
            self._waiting.append(data)
            self._bytes += size
            self._change.notify_all()

    def _work(self) -> None:
        try:
            made = hashlib.sha256()
            with direct.Writer(self.path) as file:
                while (data := self._next()) is not None:
                    made.update(data)
                    file.write(data)
                    size = memoryview(data).nbytes
                    del data
                    with self._change:
                        self._bytes -= size
                        self._change.notify_all()
            self.sha256 = made.hexdigest()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _next(self) -> Any:
        with self._change:
            while not self._waiting and not self._ended:
                self._change.wait()
            return None if self._dropped or not self._waiting else self._waiting.popleft()
