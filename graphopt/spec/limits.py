"""`at most X`: the bounds that checks state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from graphopt.spec.scalars import ScalarError, describe, scalar_schema
from graphopt.spec.units import ByteSize, Count, Percent

_AT_MOST = re.compile(r"at +most +(?=\S)")


@dataclass(frozen=True, slots=True)
class AtMost:
    """An upper bound: absolute, or a percentage of what was there before."""

    limit: Percent | Count | ByteSize | float

    @property
    def relative(self) -> bool:
        """Whether the bound is a percentage."""
        return isinstance(self.limit, Percent)

    def bound(self, before: int | float) -> Fraction | float:
        """Return the greatest value allowed, given the value before."""
        if isinstance(self.limit, Percent):
            return self.limit.fraction * (Fraction(before) if isinstance(before, int) else before)
        return self.limit

    def __str__(self) -> str:
        return f"at most {self.limit:g}" if type(self.limit) is float else f"at most {self.limit}"


class _Limit:
    def __init__(self, *kinds: type[Percent] | type[Count] | type[ByteSize] | type[float], sample: str) -> None:
        self.kinds = kinds
        self.sample = sample

    def parse(self, value: object) -> AtMost:
        if isinstance(value, AtMost):
            return value
        match = _AT_MOST.match(value) if isinstance(value, str) else None
        if match is None or not isinstance(value, str):
            help = f"write it like 'at most {self.sample}'"
            raise ScalarError.about("bad_limit", f"{describe(value)} is not a limit", help=(help,))
        text, start = value[match.end() :].rstrip(), match.end()
        try:
            return AtMost(self.parse_limit(text))
        except ScalarError as error:
            length = len(text) if error.length is None else error.length
            raise ScalarError(error.diagnostics[0], start + error.start, length) from None

    def parse_limit(self, text: str) -> Percent | Count | ByteSize | float:
        if Percent in self.kinds and text.endswith("%"):
            return Percent.parse(text)
        kind = next((kind for kind in self.kinds if kind is not Percent), Percent)
        if kind is not float:
            parsed: Percent | Count | ByteSize = kind.parse(text)  # type: ignore[union-attr]
            return parsed
        if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?", text):
            raise ScalarError.about("bad_limit", f"{text!r} is not a number", help=(f"write 'at most {self.sample}'",))
        return float(text)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": "^at +most +\\S", "examples": [f"at most {self.sample}"]}


AtMostPercent = Annotated[AtMost, _Limit(Percent, sample="5%")]
AtMostNumber = Annotated[AtMost, _Limit(float, sample="20")]
AtMostCount = Annotated[AtMost, _Limit(Percent, Count, sample="80% or at most 1.5B")]
AtMostBytes = Annotated[AtMost, _Limit(Percent, ByteSize, sample="80% or at most 4GiB")]
