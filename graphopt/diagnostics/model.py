"""What an error says, as data: a place in a file and the sentences around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """A run of characters in a file, 1-based; line 0 means the command line."""

    file: str
    line: int
    col: int
    length: int = 1
    source: str | None = field(default=None, compare=False, repr=False)
    """The line itself, kept so that a message needs no file to be read again."""

    def narrow(self, start: int, length: int) -> Place:
        """Return the part of this place that begins `start` characters in."""
        return replace(self, col=self.col + start, length=max(1, length))

    def to_json(self) -> dict[str, Any]:
        """Return the place as plain data."""
        return {"file": self.file, "line": self.line, "col": self.col, "length": self.length, "source": self.source}

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One error: a stable code, a sentence, where it is, what is known about it and what to do."""

    code: str
    message: str
    place: Place | None = None
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()

    def at(self, place: Place | None) -> Diagnostic:
        """Return the same diagnostic at another place."""
        return replace(self, place=place)

    def to_json(self) -> dict[str, Any]:
        """Return the diagnostic as plain data."""
        return {
            "code": self.code,
            "message": self.message,
            "place": None if self.place is None else self.place.to_json(),
            "notes": list(self.notes),
            "help": list(self.help),
        }
