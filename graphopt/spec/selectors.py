"""Which layers and which parts of a model a step is about; a selector that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from graphopt.diagnostics import did_you_mean
from graphopt.spec.scalars import ScalarError, describe, scalar_schema

MOST_TERMS = 4096
_RANGE = re.compile(r"(-?[0-9]{1,9})(?:\s*\.\.\s*(-?[0-9]{1,9}))?")
_HELP = ("write all, 3, 1..-2 or [0, 3, 5..7]",)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layers:
    """A choice of layers: inclusive ranges, counted from the end where negative."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, value: object) -> Layers:
        """Return the choice that a value means; anything else raises ScalarError."""
        if isinstance(value, Layers):
            return value
        if value == "all":
            return cls(((0, -1),))
        terms = value if isinstance(value, list | tuple) else (value,)
        if not terms:
            raise ScalarError.about("selector_empty", "an empty list selects no layer", help=_HELP)
        if len(terms) > MOST_TERMS:
            raise ScalarError.about("selector_syntax", f"a list of {len(terms)} layers (at most {MOST_TERMS})")
        return cls(tuple(_range(term) for term in terms))

    def resolve(self, total: int) -> tuple[int, ...]:
        """Return the chosen indices among `total` layers; out of range or no match raises ScalarError."""
        chosen: set[int] = set()
        for first, last in self.ranges:
            for index in (first, last):
                if not -total <= index < total:
                    message = f"there is no layer {index}: the model has {total} layers"
                    allowed = f"layers are 0..{total - 1}, or {-total}..-1 from the end"
                    raise ScalarError.about("selector_range", message, notes=(allowed,) if total else ())
            start, stop = first % total, last % total
            if start > stop:
                message = f"{first}..{last} selects no layer of {total}: it runs from {start} to {stop}"
                raise ScalarError.about("selector_empty", message)
            chosen.update(range(start, stop + 1))
        return tuple(sorted(chosen))

    def __str__(self) -> str:
        if self.ranges == ((0, -1),):
            return "all"
        return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in self.ranges)

    def plain(self) -> str | list[int | str]:
        """What a spec says for this choice, so that it reads back: one term as text, several as a list."""
        if len(self.ranges) == 1:
            return str(self)
        return [first if first == last else f"{first}..{last}" for first, last in self.ranges]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(cls.parse, cls.plain)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        term = [{"type": "integer"}, {"type": "string", "pattern": r"^(all|-?[0-9]+(\s*\.\.\s*-?[0-9]+)?)$"}]
        return {
            "description": "layers: all, an index, an inclusive range 1..-2, or a list of these",
            "anyOf": [*term, {"type": "array", "items": {"anyOf": term}, "minItems": 1}],
        }


def _range(term: object) -> tuple[int, int]:
    if isinstance(term, int) and not isinstance(term, bool):
        return term, term
    match = _RANGE.fullmatch(term.strip()) if isinstance(term, str) else None
    if match is None:
        raise ScalarError.about("selector_syntax", f"{describe(term)} does not select layers", help=_HELP)
    first, last = int(match[1]), int(match[2] or match[1])
    if (first < 0) == (last < 0) and first > last:
        message = f"{term} selects no layer"
        raise ScalarError.about("selector_empty", message, help=(f"did you mean {last}..{first}?",))
    return first, last


LONGEST_GLOB = 200


def check_glob(pattern: str) -> str:
    """Return a glob over dotted paths; one that cannot match anything raises ScalarError."""
    if not pattern or len(pattern) > LONGEST_GLOB or not all(pattern.split(".")):
        help = "write it like model.layers.*.mlp or **.mlp"
        raise ScalarError.about("selector_syntax", f"{describe(pattern)} is not a path", help=(help,))
    return pattern


def select_paths(patterns: Sequence[str], paths: Iterable[str]) -> tuple[str, ...]:
    """Return the dotted paths that match a glob: `*` within a name, `**` over any number of names.

    Patterns are anchored at both ends; one that matches nothing raises ScalarError.
    """
    known = list(paths)
    chosen: set[str] = set()
    for pattern in patterns:
        names = check_glob(pattern).split(".")
        found = [path for path in known if _matches(names, path.split("."), "**", _name_matches)]
        if not found:
            near = did_you_mean(pattern, known)
            notes = (f"among {len(known)} paths, such as " + ", ".join(known[:3]),) if known else ()
            raise ScalarError.about("selector_empty", f"'{pattern}' matches nothing", notes=notes, help=near)
        chosen.update(found)
    return tuple(path for path in known if path in chosen)


def _name_matches(pattern: str, name: str) -> bool:
    return _matches(pattern, name, "*", str.__eq__)


def _matches(pattern: Sequence[T], items: Sequence[T], star: T, same: Callable[[T, T], bool]) -> bool:
    """Compare greedily, going back to the last star only: no pattern can take exponential time."""
    at, index, last_star, resume = 0, 0, -1, 0
    while index < len(items):
        if at < len(pattern) and pattern[at] == star:
            last_star, resume = at, index
            at += 1
        elif at < len(pattern) and same(pattern[at], items[index]):
            at, index = at + 1, index + 1
        elif last_star >= 0:
            resume += 1
            at, index = last_star + 1, resume
        else:
            return False
    return all(rest == star for rest in pattern[at:])
