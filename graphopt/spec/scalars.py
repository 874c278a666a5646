"""YAML 1.2 core scalars, the error a scalar can cause, and how scalar types enter pydantic models."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from pydantic_core import core_schema

from graphopt.diagnostics import Diagnostic, Place, SpecError

LONGEST_NUMBER = 100

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


class ScalarError(SpecError, ValueError):
    """A value that does not mean anything, with the offending run inside its own text.

    It is a ValueError too, so that pydantic collects it when a validator raises it.
    """

    def __init__(self, diagnostic: Diagnostic, start: int = 0, length: int | None = None) -> None:
        super().__init__(diagnostic)
        self.start = start
        self.length = length

    @classmethod
    def about(
        cls,
        code: str,
        message: str,
        *,
        start: int = 0,
        length: int | None = None,
        notes: tuple[str, ...] = (),
        help: tuple[str, ...] = (),
    ) -> ScalarError:
        """Return an error about `length` characters from `start`, or about the whole value."""
        return cls(Diagnostic(code, message, None, notes, help), start, length)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.diagnostics[0], self.start, self.length)

    def at(self, place: Place) -> SpecError:
        """Return the error at the place of its value."""
        return SpecError(self.diagnostics[0].at(place))


def resolve_plain(text: str) -> bool | int | float | str | None:
    """Return what an unquoted scalar means in YAML 1.2; a number out of range raises ScalarError."""
    if text in _WORDS:
        return _WORDS[text]
    if match := _INFINITY.fullmatch(text):
        return -math.inf if match[1] == "-" else math.inf
    is_int = _INT.fullmatch(text) or _OCTAL.fullmatch(text) or _HEX.fullmatch(text)
    if not is_int and not _FLOAT.fullmatch(text):
        return text
    if len(text) > LONGEST_NUMBER:
        raise ScalarError.about("yaml_number", f"a number of {len(text)} characters (at most {LONGEST_NUMBER})")
    if text.startswith(("0o", "0x")):
        return int(text[2:], 8 if text[1] == "o" else 16)
    if is_int:
        return int(text)
    value = float(text)
    if math.isinf(value):
        raise ScalarError.about("yaml_number", f"{text} is too large for a number", help=("write .inf for infinity",))
    return value


def describe(value: object) -> str:
    """Return a value as a message names it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return str(value)


def is_number(value: object) -> bool:
    """Return whether a value is a number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def scalar_schema(parse: Callable[[Any], object], plain: Callable[[Any], object] = str) -> core_schema.CoreSchema:
    """Return the pydantic schema of a type that is made from a scalar by `parse` and written by `plain`."""
    return core_schema.no_info_plain_validator_function(
        parse, serialization=core_schema.plain_serializer_function_ser_schema(plain)
    )
