"""The one function that turns a diagnostic into text."""

from __future__ import annotations

import unicodedata

from graphopt.diagnostics.model import Diagnostic, Place

WIDEST_SOURCE = 140
GUTTER = 5
RED, BLUE, BOLD, RESET = "\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"


def render(diagnostic: Diagnostic, color: bool = False) -> str:
    """Return the diagnostic as text: place, message and code, the line with a caret run, notes and help."""

    def paint(style: str, text: str) -> str:
        return f"{style}{text}{RESET}" if color else text

    place = diagnostic.place
    where = "" if place is None else paint(BOLD, f"{_visible(str(place))}: ")
    lines = [f"{where}{paint(RED, 'error')}: {_visible(diagnostic.message)}  [{diagnostic.code}]"]
    gutter = GUTTER
    if place is not None and place.source is not None:
        number = str(place.line) if place.line else ""
        gutter = max(GUTTER, len(number))
        source, blank, caret = _excerpt(place, place.source)
        lines.append(f"{paint(BLUE, f'{number:>{gutter}} |')} {source}".rstrip())
        lines.append(f"{paint(BLUE, ' ' * gutter + ' |')} {blank}{paint(RED, caret)}")
    bullet = " " * (gutter + 1) + "= "
    following = "\n" + " " * len(bullet)
    for text in (*diagnostic.notes, *(f"help: {text}" for text in diagnostic.help)):
        lines.append(paint(BLUE, bullet) + _visible(text, keep_newlines=True).replace("\n", following))
    return "\n".join(lines)


def _excerpt(place: Place, source: str) -> tuple[str, str, str]:
    start = min(max(place.col - 1, 0), len(source))
    end = max(start, min(start + place.length, len(source)))
    left, right = 0, len(source)
    if len(source) > WIDEST_SOURCE:
        left = max(0, min(start - WIDEST_SOURCE // 4, len(source) - WIDEST_SOURCE))
        right = left + WIDEST_SOURCE
        end = max(start, min(end, right))
    before, marked, after = (_visible(part) for part in (source[left:start], source[start:end], source[end:right]))
    before = ("..." if left else "") + before
    after += "..." if right < len(source) else ""
    return before + marked + after, " " * _width(before), "^" * max(1, _width(marked))


def _visible(text: str, *, keep_newlines: bool = False) -> str:
    """Specs are untrusted: their control and direction characters must not reach the terminal."""
    shown = []
    for char in text:
        if char == "\t":
            shown.append(" ")
        elif (char == "\n" and keep_newlines) or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(char)
        else:
            shown.append(f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")
    return "".join(shown)


def _width(text: str) -> int:
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
