"""Values with units: percentages, bytes, durations and counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from graphopt.diagnostics import closest
from graphopt.spec.scalars import ScalarError, describe, is_number, scalar_schema

_NUMBER = r"[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][-+]?[0-9]{1,2})?"
_QUANTITY = re.compile(rf"([-+]?{_NUMBER})[ ]*(\S*)")
_BYTES = {"B": 1} | {
    f"{prefix}B": base**power
    for base, prefixes in ((1000, ("k", "M", "G", "T")), (1024, ("Ki", "Mi", "Gi", "Ti")))
    for power, prefix in enumerate(prefixes, 1)
}
_SECONDS = {
    "ns": Fraction(1, 10**9),
    "us": Fraction(1, 10**6),
    "µs": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _quantity(text: str, what: str, sample: str) -> tuple[Fraction, str, int]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ScalarError.about("bad_unit", f"{describe(text)} is not {what}", help=(f"write it like {sample}",))
    number = Fraction(match[1])
    if number < 0:
        raise ScalarError.about("out_of_range", f"{what} cannot be negative: {text}", start=0, length=len(match[1]))
    return number, match[2], match.start(2)


def _unit(units: dict[str, Any], unit: str, start: int, text: str, what: str) -> Any:
    if unit in units:
        return units[unit]
    near = [name for name in units if name and name.casefold() == unit.casefold()]
    guess = near or [name for name in (closest(unit, [name for name in units if name]),) if name]
    stem = text[:start].rstrip()
    raise ScalarError.about(
        "bad_unit",
        f"unknown unit '{unit}' of {what}" if unit else f"{text} has no unit",
        start=start if unit else 0,
        length=len(unit) or len(text),
        notes=("units: " + ", ".join(name for name in units if name),),
        help=tuple(f"did you mean {stem}{name}?" for name in guess),
    )


def _text_only(value: object, what: str, help: str) -> str:
    if isinstance(value, str):
        return value
    raise ScalarError.about("bad_unit", f"{describe(value)} is not {what}", help=(help,))


class _Scalar:
    """What the types of this file have in common: how pydantic reads and describes them."""

    description: ClassVar[str]
    examples: ClassVar[tuple[str, ...]]
    json_types: ClassVar[tuple[str, ...]] = ("string",)

    @classmethod
    def parse(cls, value: object) -> Self:
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        kinds = cls.json_types
        return {
            "type": kinds[0] if len(kinds) == 1 else list(kinds),
            "description": cls.description,
            "examples": list(cls.examples),
        }


@dataclass(frozen=True, slots=True, order=True)
class Percent(_Scalar):
    """A percentage, kept exact: 29% of 100 is 29."""

    fraction: Fraction
    description = "a percentage"
    examples = ("75%",)

    @classmethod
    def parse(cls, value: object) -> Percent:
        """Return the percentage that a text means; anything else raises ScalarError."""
        if isinstance(value, Percent):
            return value
        if is_number(value):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            fits = isinstance(value, float) and 0 < value <= 1
            as_percent = f"{value * 100:g}%" if fits and isinstance(value, float) else f"{shown}%"
            raise ScalarError.about("bad_unit", f"{shown} has no unit", help=(f"did you mean {as_percent}?",))
        text = _text_only(value, "a percentage", "write it like 75%")
        number, unit, start = _quantity(text, "a percentage", "75%")
        _unit({"%": 1}, unit, start, text, "a percentage")
        return cls(number / 100)

    def of(self, whole: int) -> Fraction:
        """Return this share of a whole, exactly."""
        return self.fraction * whole

    def __float__(self) -> float:
        return float(self.fraction)

    def __str__(self) -> str:
        return f"{_decimal(self.fraction * 100)}%"


def _share(value: Percent) -> Percent:
    if value.fraction > 1:
        raise ScalarError.about("out_of_range", f"{value} is more than 100%")
    return value


Share = Annotated[Percent, AfterValidator(_share)]
"""A percentage of at most 100%."""


class ByteSize(_Scalar, int):
    """A number of bytes, written with its unit."""

    description = "a size in bytes with its unit"
    examples = ("4GiB", "512MB")

    @classmethod
    def parse(cls, value: object) -> ByteSize:
        """Return the size that a text means; anything else raises ScalarError."""
        if isinstance(value, ByteSize):
            return value
        if is_number(value):
            raise ScalarError.about("bad_unit", f"{value} has no unit", help=(f"did you mean {value}B?",))
        text = _text_only(value, "a size in bytes", "write it like 4GiB or 512MB")
        number, unit, start = _quantity(text, "a size in bytes", "4GiB or 512MB")
        total = number * _unit(_BYTES, unit, start, text, "a size in bytes")
        if total.denominator != 1:
            raise ScalarError.about("bad_unit", f"{text} is not a whole number of bytes")
        return cls(total)

    def __str__(self) -> str:
        for unit, size in sorted(_BYTES.items(), key=lambda item: -item[1]):
            if self and self % size == 0:
                return f"{int(self) // size}{unit}"
        return f"{int(self)}B"


class Duration(_Scalar, float):
    """A time in seconds, written with its unit."""

    description = "a time with its unit"
    examples = ("6ms", "1.5s")

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Return the time that a text means; anything else raises ScalarError."""
        if isinstance(value, Duration):
            return value
        if is_number(value):
            raise ScalarError.about("bad_unit", f"{value} has no unit", help=(f"did you mean {value}ms or {value}s?",))
        text = _text_only(value, "a time", "write it like 6ms")
        number, unit, start = _quantity(text, "a time", "6ms")
        return cls(number * _unit(_SECONDS, unit, start, text, "a time"))

    def __str__(self) -> str:
        for unit in ("s", "ms", "us"):
            if self >= _SECONDS[unit]:
                return f"{float(self) / float(_SECONDS[unit]):.12g}{unit}"
        return f"{float(self) * 1e9:.12g}ns"


class Count(_Scalar, int):
    """A whole number, which may be written with k, M, B or T."""

    description = "a whole number, optionally with k, M, B or T"
    examples = ("1.5B", "350M")
    json_types = ("integer", "string")

    @classmethod
    def parse(cls, value: object) -> Count:
        """Return the count that a number or a text means; anything else raises ScalarError."""
        if isinstance(value, Count):
            return value
        text = value
        if is_number(value):
            text = str(value)
        text = _text_only(text, "a count", "write it like 1.5B, 350M or 2048")
        number, unit, start = _quantity(text, "a count", "1.5B, 350M or 2048")
        total = number * _unit(_COUNTS, unit, start, text, "a count")
        if total.denominator != 1:
            raise ScalarError.about("bad_unit", f"{text} is not a whole number")
        return cls(total)

    def __str__(self) -> str:
        return str(int(self))


def _decimal(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"
