"""Text pages: labelled lines that print plainly into a pipe and with colours on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

LABEL = 12


@dataclass
class Page:
    """Lines with a style each; `plain()` and `rich()` say the same."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)

    def title(self, text: str, more: str = "") -> None:
        """A line that begins a section."""
        self.lines.append(("bold", text, f"  {more}" if more else ""))

    def row(self, label: str, text: str, *, style: str = "cyan") -> None:
        """A labelled line of a section."""
        gap = " " * max(2, LABEL - len(label))
        self.lines.append((style, f"  {label}", gap + text))

    def plain(self) -> str:
        """The page without colours."""
        return "\n".join((head + rest).rstrip() for _, head, rest in self.lines) + "\n"

    def rich(self) -> Text:
        """The page with colours."""
        from rich.text import Text

        made = Text()
        for style, head, rest in self.lines:
            made.append(head, style=style)
            made.append(rest.rstrip() + "\n")
        return made


def fold(names: Iterable[str]) -> list[str]:
    """Dotted names with the numbers in which they differ gathered, as in `model.layers.{0..3,5}.mlp`.

    Several numbers are gathered where every combination of them is there: `stages.{0,1}.blocks.{0..2}`.
    """
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        groups.setdefault(tuple("#" if part.isdigit() else part for part in parts), []).append(parts)
    folded: list[str] = []
    for members in groups.values():
        places = [i for i in range(len(members[0])) if len({parts[i] for parts in members}) > 1]
        numbers = {place: sorted({int(parts[place]) for parts in members}) for place in places}
        if places and math.prod(map(len, numbers.values())) == len(members):
            together = {place: "{" + _ranges(found) + "}" for place, found in numbers.items()}
            folded.append(".".join(together.get(i, part) for i, part in enumerate(members[0])))
        else:
            folded += [".".join(parts) for parts in members]
    return folded


def _ranges(numbers: list[int]) -> str:
    runs = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        runs.append(f"{values[0]}..{values[-1]}" if len(values) > 2 else ",".join(map(str, values)))
    return ",".join(runs)


def size(count: float) -> str:
    """Bytes for people, in binary units: `5.25 MiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def change(before: float, after: float) -> str:
    """A relative change: `-25.0%`, or nothing when there is none."""
    if before == after:
        return ""
    return f"{100 * (after - before) / before:+.1f}%" if before else "new"
