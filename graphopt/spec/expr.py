"""Arithmetic over named dimensions, such as `round_to(0.75 * neurons, 32)`: parsed by a whitelist, never evaluated
as Python, exact, and bounded in size before anything is computed."""

from __future__ import annotations

import ast
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from graphopt.diagnostics import did_you_mean
from graphopt.spec.scalars import ScalarError, describe, is_number, scalar_schema

LONGEST_SOURCE = 200
DEEPEST = 20
LARGEST_LITERAL = 10**9
LARGEST_EXPONENT = 16
MOST_BITS = 4096

_TOKEN = re.compile(r"[ \t]+|(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\*\*|//|[-+*/%(),]")
_ALLOWED = "allowed: numbers, dimensions, + - * / // % **, parentheses, "


@dataclass(frozen=True, slots=True)
class _Number:
    value: Fraction
    start: int = field(compare=False)
    length: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Name:
    name: str
    start: int = field(compare=False)
    length: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class _Apply:
    function: str
    arguments: tuple[_Tree, ...]
    start: int = field(compare=False)
    length: int = field(compare=False)


_Tree = _Number | _Name | _Apply


def _round_to(value: Fraction, multiple: Fraction) -> Fraction:
    return multiple * math.floor(value / multiple + Fraction(1, 2))


_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.USub: "neg",
    ast.UAdd: "pos",
}
_EXACT: dict[str, Callable[..., Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
    "%": lambda a, b: a % b,
    "**": lambda a, b: a ** int(b),
    "neg": lambda a: -a,
    "pos": lambda a: a,
    "min": min,
    "max": max,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "round_to": _round_to,
}
_ARITY = {"floor": (1, 1), "ceil": (1, 1), "min": (2, 8), "max": (2, 8), "round_to": (2, 2)}


@dataclass(frozen=True, slots=True)
class Expr:
    """An immutable arithmetic expression; two are equal when they compute the same formula."""

    source: str = field(compare=False)
    tree: _Tree = field(repr=False)

    @classmethod
    def parse(cls, value: object) -> Expr:
        """Return the expression that a number or a text means; anything else raises ScalarError."""
        if isinstance(value, Expr):
            return value
        if is_number(value) and value == value and value not in (math.inf, -math.inf):
            value = str(value) if isinstance(value, int) else format(Decimal(repr(value)), "f")
        if not isinstance(value, str):
            raise ScalarError.about("bad_expression", f"{describe(value)} is not an expression", help=(_SAMPLE,))
        return cls(value.strip(), _parse(value))

    @property
    def names(self) -> frozenset[str]:
        """The dimensions that the expression mentions."""
        return frozenset(node.name for node in _nodes(self.tree) if isinstance(node, _Name))

    def check(self, known: Iterable[str]) -> None:
        """Raise ScalarError at the first name that is not a known dimension."""
        names = sorted(known)
        for node in _nodes(self.tree):
            if isinstance(node, _Name) and node.name not in names:
                raise ScalarError.about(
                    "unknown_dimension",
                    f"unknown dimension '{node.name}'",
                    start=node.start,
                    length=node.length,
                    notes=("dimensions: " + (", ".join(names) or "none"),),
                    help=did_you_mean(node.name, names),
                )

    def evaluate(self, dimensions: Mapping[str, int | float | Fraction]) -> int | Fraction:
        """Return the exact value; an unknown name, a division by zero or a huge value raises ScalarError."""
        self.check(dimensions)
        value = _evaluate(self.tree, {name: Fraction(dimensions[name]) for name in self.names})
        return value.numerator if value.denominator == 1 else value

    def integer(self, dimensions: Mapping[str, int | float | Fraction]) -> int:
        """Return the value as an integer; one that is not raises ScalarError with the value."""
        value = self.evaluate(dimensions)
        if isinstance(value, int):
            return value
        given = ", ".join(f"{name} = {dimensions[name]}" for name in sorted(self.names))
        raise ScalarError.about(
            "not_an_integer",
            f"'{self.source}' is {_shown(value)}, not an integer",
            notes=(f"with {given}",) if given else (),
            help=("use floor(...), ceil(...) or round_to(..., multiple)",),
        )

    def to_sympy(self) -> Any:
        """Return the expression over positive integer symbols."""
        return _to_sympy(self.tree, importlib.import_module("sympy"))

    def __str__(self) -> str:
        return self.source

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "type": ["integer", "number", "string"],
            "maxLength": LONGEST_SOURCE,
            "description": "arithmetic over dimensions, with " + ", ".join(_ARITY),
            "examples": ["heads / 4", "round_to(0.75 * neurons, 32)"],
        }


_SAMPLE = "write it like 'heads / 4' or 'round_to(0.75 * neurons, 32)'"


def _shown(value: Fraction) -> str:
    decimal = f"{float(value):.10g}" if abs(value) < 10**15 else str(value)
    return decimal if Fraction(decimal) == value else f"{value} (about {decimal})"


def _refuse(message: str, start: int, length: int, *, help: tuple[str, ...] = ()) -> ScalarError:
    notes = (_ALLOWED + ", ".join(_ARITY),)
    return ScalarError.about("bad_expression", message, start=start, length=length, notes=notes, help=help)


def _parse(text: str) -> _Tree:
    if len(text) > LONGEST_SOURCE:
        raise _refuse(f"an expression of {len(text)} characters (at most {LONGEST_SOURCE})", 0, len(text))
    lead = len(text) - len(text.lstrip(" \t"))
    _check_tokens(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text[lead:].rstrip(), mode="eval").body
    except SyntaxError as error:
        at = min((error.offset or 1) - 1 + lead, max(0, len(text) - 1))
        raise _refuse(f"{describe(text)} is not an expression: {error.msg}", at, 1, help=(_SAMPLE,)) from None
    return _Builder(text, lead).build(body, 1)


def _check_tokens(text: str) -> None:
    """Nothing reaches Python's parser but numbers, plain names and arithmetic signs."""
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise _refuse(f"'{text[at]}' is not allowed in an expression", at, 1)
        token, at = match[0], match.end()
        if match["name"] and token.startswith("_"):
            raise _refuse(f"'{token}' is not a dimension or a function", match.start(), len(token))
        if match["name"] and text[match.start() - 1 : match.start()].isdigit():
            raise _refuse(f"'{token}' directly after a number", match.start(), len(token))
        if match["number"] and Fraction(token) >= LARGEST_LITERAL:
            raise _refuse(f"{token} is too large (at most {LARGEST_LITERAL - 1})", match.start(), len(token))
        if match["number"] and re.match(r"0[0-9]", token):
            raise _refuse(f"{token} starts with a zero", match.start(), len(token))


class _Builder:
    def __init__(self, text: str, lead: int) -> None:
        self.text = text
        self.lead = lead

    def span(self, node: Any) -> tuple[int, int]:
        return node.col_offset + self.lead, node.end_col_offset - node.col_offset

    def build(self, node: ast.expr, depth: int) -> _Tree:
        start, length = self.span(node)
        if depth > DEEPEST:
            raise _refuse(f"nested deeper than {DEEPEST} operations", start, length)
        if isinstance(node, ast.Constant) and is_number(node.value):
            return _Number(Fraction(self.text[start : start + length]), start, length)
        if isinstance(node, ast.Name):
            if node.id in _ARITY:
                raise _refuse(f"'{node.id}' is a function: write {node.id}(...)", start, length)
            return _Name(node.id, start, length)
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _Apply(_OPERATORS[type(node.op)], (self.build(node.operand, depth + 1),), start, length)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            if isinstance(node.op, ast.Pow):
                self.check_exponent(node.right)
            sides = (self.build(node.left, depth + 1), self.build(node.right, depth + 1))
            return _Apply(_OPERATORS[type(node.op)], sides, start, length)
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        raise _refuse(f"{self.text[start : start + length]!r} is not arithmetic", start, length)

    def check_exponent(self, node: ast.expr) -> None:
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, int) or not 0 <= value <= LARGEST_EXPONENT:
            start, length = self.span(node)
            shown = self.text[start : start + length]
            raise _refuse(f"the exponent {shown} is not a number from 0 to {LARGEST_EXPONENT}", start, length)

    def call(self, node: ast.Call, depth: int) -> _Tree:
        start, length = self.span(node)
        name_at, name_length = self.span(node.func)
        name = self.text[name_at : name_at + name_length]
        if not isinstance(node.func, ast.Name) or name not in _ARITY:
            raise _refuse(f"unknown function '{name}'", name_at, name_length, help=did_you_mean(name, _ARITY))
        least, most = _ARITY[name]
        if not least <= len(node.args) <= most or node.keywords:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise _refuse(f"{name} takes {wanted} values, not {len(node.args)}", start, length)
        return _Apply(name, tuple(self.build(argument, depth + 1) for argument in node.args), start, length)


def _nodes(tree: _Tree) -> Iterable[_Tree]:
    yield tree
    if isinstance(tree, _Apply):
        for argument in tree.arguments:
            yield from _nodes(argument)


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _evaluate(tree: _Tree, dimensions: Mapping[str, Fraction]) -> Fraction:
    if isinstance(tree, _Number):
        return tree.value
    if isinstance(tree, _Name):
        return dimensions[tree.name]
    values = [_evaluate(argument, dimensions) for argument in tree.arguments]
    exponent = int(values[1]) if tree.function == "**" else 1
    if sum(map(_bits, values)) * exponent > MOST_BITS:
        raise ScalarError.about("bad_expression", "the value is too large", start=tree.start, length=tree.length)
    if tree.function in ("/", "//", "%", "round_to") and values[1] == 0:
        divisor = tree.arguments[1]
        raise ScalarError.about("bad_expression", "division by zero", start=divisor.start, length=divisor.length)
    return _EXACT[tree.function](*values)


def _to_sympy(tree: _Tree, sympy: Any) -> Any:
    if isinstance(tree, _Number):
        return sympy.Rational(tree.value.numerator, tree.value.denominator)
    if isinstance(tree, _Name):
        return sympy.Symbol(tree.name, integer=True, positive=True)
    values = [_to_sympy(argument, sympy) for argument in tree.arguments]
    functions: dict[str, Callable[..., Any]] = {
        **_EXACT,
        "//": lambda a, b: sympy.floor(a / b),
        "%": sympy.Mod,
        "min": sympy.Min,
        "max": sympy.Max,
        "floor": sympy.floor,
        "ceil": sympy.ceiling,
        "round_to": lambda a, b: b * sympy.floor(a / b + sympy.Rational(1, 2)),
    }
    return functions[tree.function](*values)
