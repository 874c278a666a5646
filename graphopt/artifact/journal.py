"""The journal of a save that may be killed: finished files with what they were made from and what they hold.

A file is kept on a restart when it would be made from the same tensors by the same expressions and still has the
bytes that were written. What cannot be told apart (tensors in memory) is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.ir.weights import Expr, Rows, Source, WeightStore

JOURNAL_FILE = "journal.jsonl"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Finished:
    """One line of the journal."""

    file: str
    key: str
    bytes: int
    sha256: str


class Journal:
    """The journal in a directory; lines that were cut short by the kill are ignored."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: list[str] = []
        self._lines: dict[str, Finished] = {}
        file = directory / JOURNAL_FILE
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
            try:
                found = Finished(**json.loads(line))
                self._lines[found.file] = found
            except (ValueError, TypeError):
                continue

    def keeps(self, file: str, key: str | None) -> bool:
        """Whether a file is finished: same key, same size, same bytes."""
        line, path = self._lines.get(file), self.directory / file
        if key is None or line is None or line.key != key or not path.is_file() or path.stat().st_size != line.bytes:
            return False
        if _sha256(path) != line.sha256:
            return False
        self.kept.append(file)
        return True

    def finished(self, line: Finished) -> None:
        """Add a line; it is on the disk when this returns."""
        with (self.directory / JOURNAL_FILE).open("a", encoding="utf-8") as file:
            # A line that a kill cut short must not swallow this one.
            file.write("\n" + json.dumps(vars(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Take the journal away: the directory is whole."""
        (self.directory / JOURNAL_FILE).unlink(missing_ok=True)


def digest(store: WeightStore, expr: Expr) -> str | None:
    """What an expression's value is determined by, as a hash; None when its tensors have no identity."""
    identity = getattr(store.source, "identity", None)
    made = hashlib.sha256()
    for part in _walk(expr, identity):
        if part is None:
            return None
        made.update(len(part).to_bytes(8, "little"))
        made.update(part)
    return made.hexdigest()


def _walk(value: Any, identity: Any) -> Iterable[bytes | None]:
    if isinstance(value, Source):
        yield identity(value.name).encode() if identity is not None else None
        yield str(value.kind).encode()
    elif isinstance(value, Expr):
        yield type(value).__name__.encode()
        if isinstance(value, Rows) or is_dataclass(value):
            for each in fields(value):
                yield each.name.encode()
                yield from _walk(getattr(value, each.name), identity)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, tuple | list):
        if value and all(isinstance(item, int) for item in value):
            yield repr(value).encode()
            return
        yield str(len(value)).encode()
        for item in value:
            yield from _walk(item, identity)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        yield repr(value).encode()
    else:
        yield None


def _sha256(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            made.update(chunk)
    return made.hexdigest()
