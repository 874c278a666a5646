"""Large files past the page cache: a checkpoint is read once and written once, and nobody gains from pages kept of it.

On a virtual machine whose free memory is not backed yet, reading 3 GB through the page cache took 5.9 CPU seconds and
writing them 6.8, past it 0.2 each. Where a file system knows no direct access, the same calls go through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

# What every device that is sold can take: places, lengths and addresses are multiples of it.
ALIGN = 4096
# Below it a read costs more than its pages.
_SMALL = 1 << 20
_BUFFER = 8 << 20
_READING = ThreadPoolExecutor(1, "graphopt-reader")


def _up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _aligned(size: int) -> torch.Tensor:
    """An empty uint8 tensor whose address is a multiple of ALIGN; `size` is one, too."""
    buffer = torch.empty(size + ALIGN, dtype=torch.uint8)
    shift = -buffer.data_ptr() % ALIGN
    return buffer[shift : shift + size]


def _directly(path: Path, flags: int) -> int | None:
    """The file opened past the page cache; None where its file system knows no such thing."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666) if hasattr(os, "O_DIRECT") else None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return None
        raise


class Reader:
    """An open file; raises OSError as reading does, EOFError when the file ends early."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        self._direct = _directly(path, os.O_RDONLY)
        self._end = -1
        self._ahead: tuple[int, int, Future[torch.Tensor]] | None = None
        self._resident: _Resident | None = None
        if self._direct is not None:
            weakref.finalize(self, os.close, self._direct)
            # An empty file cannot be mapped, and has nothing to read.
            self._resident = _Resident(self.file) if os.fstat(self.file).st_size else None

    def read(self, first: int, last: int, most: int = 0) -> torch.Tensor:
        """Bytes `first` to `last`, uint8 `[last - first]`: from the page cache where they lie in it, else past it.

        Who reads on where the last read ended is expected to go on: as much again, not beyond `most`, is read meanwhile,
        and what of it is asked for next is not read again.
        """
        ahead, self._ahead = self._ahead, None
        data = None
        if ahead is not None and ahead[0] <= first < ahead[1]:
            data = ahead[2].result()[first - ahead[0] : last - ahead[0]]
            if first + len(data) < last:
                data = torch.cat([data, self._read(first + len(data), last)])
        if data is None:
            data = self._read(first, last)
        following = min(2 * last - first, most)
        if first == self._end and following > last:
            # The buffer is this thread's: another one's allocator would keep 200 MB of such buffers for itself.
            self._ahead = (last, following, _READING.submit(self._planned(last, following)))
        self._end = last
        return data

    def _read(self, first: int, last: int) -> torch.Tensor:
        return self._planned(first, last)()

    def _planned(self, first: int, last: int) -> Callable[[], torch.Tensor]:
        """What reads these bytes, into a buffer that is already there."""
        if (
            self._direct is None
            or last - first < _SMALL
            or (self._resident is not None and self._resident(first, last))
        ):
            return partial(_fill, self.file, torch.empty(last - first, dtype=torch.uint8), first, 0, last - first)
        lead = first % ALIGN
        return partial(_fill, self._direct, _aligned(_up(lead + last - first)), first - lead, lead, last - first)


class _Resident:
    """Whether the page cache holds a part of a file: a map of it that is never touched, and `mincore` of that."""

    def __init__(self, file: int) -> None:
        self._map = np.frombuffer(mmap.mmap(file, 0, prot=mmap.PROT_READ), dtype=np.uint8)
        self._ask = getattr(ctypes.CDLL(None), "mincore", None)

    def __call__(self, first: int, last: int) -> bool:
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        pages = np.zeros(-(-(last - start) // mmap.PAGESIZE), dtype=np.uint8)
        place = ctypes.c_void_p(self._map.ctypes.data + start)
        if self._ask is None or self._ask(place, ctypes.c_size_t(last - start), ctypes.c_void_p(pages.ctypes.data)):
            return False
        return bool((pages & 1).all())


def _fill(file: int, buffer: torch.Tensor, origin: int, lead: int, count: int) -> torch.Tensor:
    """The `count` bytes of a file from `origin + lead` on, read into the buffer together with those before them."""
    view, start = memoryview(buffer.numpy()), 0
    while start < lead + count:
        got = os.preadv(file, [view[start:]], origin + start)
        if got == 0:
            raise EOFError
        start += got
    return buffer[lead : lead + count]


class Writer:
    """A new file, written from its beginning to its end and then flushed to the disk."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        direct = _directly(path, flags)
        self._file = os.open(path, flags, 0o666) if direct is None else direct
        self._buffer = _aligned(_BUFFER).numpy()
        self._filled = 0
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                size = self.size
                self._buffer[self._filled : _up(self._filled)] = 0
                self._flush(_up(self._filled))
                os.ftruncate(self._file, size)
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, data: Any) -> None:
        """Append bytes."""
        given = np.frombuffer(data, dtype=np.uint8)
        while len(given):
            part = given[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.size += len(part)
            given = given[len(part) :]
            if self._filled == len(self._buffer):
                self._flush(self._filled)

    def _flush(self, count: int) -> None:
        """Write the first `count` bytes of the buffer, which come right after what was written before."""
        view = memoryview(self._buffer)[:count]
        place = self.size - self._filled
        while view:
            done = os.pwrite(self._file, view, place)
            view, place = view[done:], place + done
        self._filled = 0
