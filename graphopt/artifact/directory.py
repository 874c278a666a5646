"""Writing a directory as one step: all of it appears, or the old one stays."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from graphopt.artifact.native_names import TRAIL_FILE
from graphopt.diagnostics import ArtifactError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(directory: str | Path, *, source: str | None, overwrite: bool) -> Path:
    """The absolute path to write to.

    Raises ArtifactError for `..`, files, the directory that is being read or one that holds it, and non-empty
    directories unless `overwrite` is set and graphopt wrote them (they hold a trail.json).
    """
    given = Path(directory)
    if ".." in given.parts:
        raise ArtifactError.of("path_outside", f"output path {str(given)!r} contains '..'", help=("write it out",))
    target = given.expanduser().resolve()
    if source is not None:
        reading = Path(source).resolve()
        if target == reading or target in reading.parents:
            raise ArtifactError.of("overwrites_source", f"{target} holds the model that is being read")
    if target.exists() and not target.is_dir():
        raise ArtifactError.of("not_a_directory", f"{target} is a file; an artifact is a directory")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ArtifactError.of("exists", f"{target} is not empty", help=("choose another or pass overwrite=True",))
        if not (target / TRAIL_FILE).is_file():
            raise ArtifactError.of(
                "not_ours",
                f"{target} was not written by graphopt (it has no {TRAIL_FILE}), so it is not replaced",
                help=("remove it by hand or choose another",),
            )
    return target


@contextlib.contextmanager
def replacing(target: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden directory beside `target` to fill; on success it takes the place of `target`.

    On any failure, KeyboardInterrupt included, the new files go and what was at `target` stays. Only a kill leaves the
    directory behind; the next call yields it again with what it holds. Raises ArtifactError when the disk cannot hold
    `needed` bytes, nothing can be written there, or another process is writing the same artifact.
    """
    temporary = target.parent / f".{target.name}.partial"
    held: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        held = _hold(temporary)
        there = sum(path.stat().st_size for path in temporary.iterdir())
        free = shutil.disk_usage(target.parent).free + there
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        yield temporary
        _sync(temporary)
        _swap(temporary, target, target.parent / f".{target.name}.{secrets.token_hex(4)}.old")
    except OSError as error:
        if error.errno in _FULL:
            raise ArtifactError.of(
                "disk_full", f"the disk of {target} is full: this artifact needs {needed} bytes", notes=(str(error),)
            ) from error
        raise ArtifactError.of("cannot_write", f"cannot write {target}: {error}") from error
    finally:
        if held is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(held)


def _hold(directory: Path) -> int:
    """Make a directory and lock it for this process; a lock ends with its process, however that ends."""
    while True:
        directory.mkdir(exist_ok=True)
        held = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(held)
            raise ArtifactError.of(
                "being_written", f"another process is writing to {directory}", help=("wait for it, or stop it",)
            ) from error
        # The one that held it before may have renamed or removed it meanwhile.
        if directory.is_dir() and os.path.samestat(os.fstat(held), directory.stat()):
            return held
        os.close(held)


def _swap(temporary: Path, target: Path, aside: Path) -> None:
    existed = target.exists()
    try:
        if existed:
            os.rename(target, aside)
        os.rename(temporary, target)
    except BaseException:
        if existed and aside.exists() and not target.exists():
            os.rename(aside, target)
        elif existed and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
        raise
    _sync_one(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
