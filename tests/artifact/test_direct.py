"""Reading and writing past the page cache: any place, any length, any file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.frontend import direct
from graphopt.frontend.direct import ALIGN, Reader, Writer

SIZE = 2 * (8 << 20) + 4321
BYTES = os.urandom(SIZE)
SMALL = 1 << 20


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "file"
    with Writer(path) as writer:
        for start in range(0, SIZE, 3_000_001):
            writer.write(BYTES[start : start + 3_000_001])
        assert writer.size == SIZE
    return path


def forget(path: Path) -> None:
    """Drop a file from the page cache, so that it is read from the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def test_what_is_written_is_there(file: Path) -> None:
    assert file.read_bytes() == BYTES


@pytest.mark.parametrize("size", [0, 1, ALIGN - 1, ALIGN, ALIGN + 1, 8 << 20, (8 << 20) + 1])
def test_files_of_any_size(tmp_path: Path, size: int) -> None:
    with Writer(tmp_path / "file") as writer:
        writer.write(BYTES[:size])
    assert (tmp_path / "file").read_bytes() == BYTES[:size]


@given(first=st.integers(0, SIZE), length=st.one_of(st.integers(0, 9), st.integers(SMALL, SIZE)), cold=st.booleans())
@settings(max_examples=30)
def test_any_part_is_read(file: Path, first: int, length: int, cold: bool) -> None:
    last = min(first + length, SIZE)
    if cold:
        forget(file)
    assert bytes(Reader(file).read(first, last).numpy()) == BYTES[first:last]


def test_reading_on_from_place_to_place(file: Path) -> None:
    reader, last = Reader(file), SIZE - 99
    for first in (*range(5, last, 3_000_000), *range(5, last, 3_000_000), 7, 3_000_005):
        assert bytes(reader.read(first, min(first + 3_000_000, last), last).numpy()) == BYTES[first:last][:3_000_000]


@given(
    steps=st.lists(st.tuples(st.integers(0, 200_000), st.integers(1, 3 * SMALL)), min_size=1, max_size=9),
    cold=st.booleans(),
)
@settings(max_examples=30)
def test_reading_on_with_gaps_reads_nothing_twice(file: Path, steps: list[tuple[int, int]], cold: bool) -> None:
    if cold:
        forget(file)
    reader, last, read = Reader(file), 3, [0]
    with pytest.MonkeyPatch.context() as patch:
        fill = direct._fill

        def counted(*args: Any) -> Any:
            read[0] += args[-1]
            return fill(*args)

        patch.setattr(direct, "_fill", counted)
        for gap, length in steps:
            first = min(last + gap, SIZE)
            last = min(first + length, SIZE)
            assert bytes(reader.read(first, last, SIZE).numpy()) == BYTES[first:last]
        if reader._ahead is not None:
            reader._ahead[2].result()
    assert read[0] <= last + 3 * SMALL


def test_what_the_page_cache_holds_is_known(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, SIZE)
    handle = os.open(path, os.O_RDONLY)
    resident = direct._Resident(handle)
    assert not resident(17, SIZE)
    os.pread(handle, SIZE, 0)
    assert resident(17, SIZE)
    os.close(handle)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BYTES[: SMALL + 7])
    forget(path)
    with pytest.raises((EOFError, OSError)):
        Reader(path).read(5, 2 * SMALL)


def test_a_file_system_without_direct_access(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    path = tmp_path / "file"
    with Writer(path) as writer:
        writer.write(BYTES)
    assert bytes(Reader(path).read(3, SIZE).numpy()) == BYTES[3:]


def test_nothing_is_left_open_after_an_error(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BufferError), Writer(tmp_path / "file") as writer:
        writer.write(memoryview(BYTES)[::2])
    assert len(os.listdir("/proc/self/fd")) == before
