"""Configurations of a pass, drawn from its own schema: the annotations of its fields say what may be written.

Values are drawn as a spec would hold them and read as a spec is read, so that whatever comes out can be written in YAML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from hypothesis import assume
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from graphopt.diagnostics import GraphoptError
from graphopt.ir.program import Program
from graphopt.passkit import Pass
from graphopt.select.options import Amount
from graphopt.spec import Expr, Layers, Percent
from graphopt.views import Views

P = TypeVar("P", bound=Pass)
SHARES = ("50%", "75%", "25%", "90%", "100%", "10%", "1%")
FACTORS = ("{}", "{} - 1", "{} / 2", "max(1, {} // 2)", "ceil(3 * {} / 4)", "1")
ATTEMPTS = 12


@st.composite
def configurations(draw: st.DrawFn, pass_class: type[P], program: Program) -> P:
    """Valid configurations of a pass, with sizes that make sense for a program; they shrink towards defaults."""
    drawn = Drawer(pass_class, program)
    for _ in range(ATTEMPTS):
        try:
            return pass_class.model_validate_json(json.dumps(draw(drawn.model(pass_class))))
        except (ValidationError, GraphoptError):
            continue
    assume(condition=False)
    raise AssertionError("assume has raised")


class Drawer:
    """Strategies for the annotations of one pass on one program."""

    def __init__(self, pass_class: type[Pass], program: Program) -> None:
        views = Views(program)
        self.sizes = {"layers": len(views.blocks)}
        for attention in views.attentions[:1]:
            self.sizes |= {
                "heads": attention.heads,
                "kv_heads": attention.kv_heads,
                "head_dim": attention.head_dim,
            }
        for feed_forward in views.feed_forwards[:1]:
            self.sizes["neurons"] = feed_forward.neurons
        for bank in views.experts[:1]:
            self.sizes["experts"] = bank.experts
        if views.blocks:
            self.sizes["hidden"] = int(views.blocks[0].entry.meta["val"].shape[-1])
        self.dimensions: tuple[str, ...] = getattr(pass_class, "dimensions", ())

    def model(self, kind: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
        """Options of a model: each field left out (where it has a default) or drawn."""
        required: dict[str, Any] = {}
        optional: dict[str, Any] = {}
        for name, field in kind.model_fields.items():
            drawn = self.value(_annotation(field), field.alias or name)
            if drawn is None and field.examples:
                drawn = st.sampled_from(list(field.examples))
            if drawn is None:
                continue
            (required if field.is_required() or _is_tag(field) else optional)[field.alias or name] = drawn
        return st.fixed_dictionaries(required, optional=optional)

    def value(self, annotation: Any, name: str = "") -> st.SearchStrategy[Any] | None:
        """What may be written for one annotation; None when nothing is known about it."""
        bounds: list[Any] = []
        while get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            bounds += metadata
        for item in list(bounds):
            if isinstance(item, FieldInfo):
                bounds += item.metadata
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Literal:
            return st.sampled_from(arguments)
        if origin in (Union, UnionType):
            options = [self.value(part, name) for part in arguments]
            return st.one_of(*(option for option in options if option is not None))
        if annotation is NoneType:
            return st.none()
        if origin in (tuple, list):
            return self._sequence(arguments, bounds, name)
        if origin in (dict, Mapping):
            return self._mapping(arguments, name)
        if not isinstance(annotation, type):
            return None
        return self._scalar(annotation, bounds, name)

    def _scalar(self, kind: type[Any], bounds: list[Any], name: str) -> st.SearchStrategy[Any] | None:
        if kind is bool:
            return st.booleans()
        if issubclass(kind, Enum):
            return st.sampled_from([member.value for member in kind])
        if kind is int:
            low, high = _range(bounds, 0, 4)
            return st.integers(low, high)
        if kind is float:
            low, high = _range(bounds, 0, 3)
            return st.sampled_from([low + (high - low) * i / 8 for i in range(9)])
        if kind is Layers:
            return self._layers()
        if kind is Percent:
            return st.sampled_from(SHARES)
        if kind is Amount:
            return st.one_of(st.sampled_from(SHARES), self._expression(name))
        if kind is Expr:
            return self._expression(name)
        if issubclass(kind, BaseModel):
            return self.model(kind)
        examples = TypeAdapter(kind).json_schema().get("examples") if kind is not str else None
        return st.sampled_from(examples) if examples else None

    def _expression(self, name: str) -> st.SearchStrategy[Any]:
        """Numbers and formulae over the dimensions that the pass names, else over the one that its field is called."""
        known = [size for size in self.dimensions if size in self.sizes] or [
            size for size in self.sizes if size == name
        ]
        formulae = [factor.format(size) for size in known for factor in FACTORS] or ["1"]
        return st.one_of(
            st.integers(1, max((self.sizes[size] for size in known if self.sizes[size]), default=2)),
            st.sampled_from(formulae),
        )

    def _layers(self) -> st.SearchStrategy[Any]:
        last = max(0, self.sizes["layers"] - 1)
        index = st.integers(0, last)
        several = st.lists(index, min_size=1, max_size=last + 1, unique=True).map(sorted)
        return st.one_of(index, several, st.just("-1"), st.just(f"0..{last}"), st.just("all"))

    def _sequence(self, arguments: tuple[Any, ...], bounds: list[Any], name: str) -> st.SearchStrategy[Any] | None:
        item = self.value(arguments[0], name)
        if item is None:
            return None
        low = max((b.min_length for b in bounds if isinstance(b, annotated_types.MinLen)), default=0)
        # One value a layer is what most sequences mean; names are listed once each.
        high = max(low, self.sizes["layers"], 3)
        return st.lists(item, min_size=low, max_size=high, unique=get_origin(arguments[0]) is Literal)

    def _mapping(self, arguments: tuple[Any, ...], name: str) -> st.SearchStrategy[Any] | None:
        item = self.value(arguments[1], name)
        if item is None:
            return None
        if arguments[0] is int:
            last = max(0, self.sizes["layers"] - 1)
            units = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(sorted)
            values = units if get_origin(arguments[1]) is tuple else item
            return st.dictionaries(st.integers(0, last).map(str), values, min_size=1, max_size=2)
        return None


def _annotation(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _is_tag(field: FieldInfo) -> bool:
    """Whether a field says which member of a union it stands in: such a word cannot be left out."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def _range(bounds: list[Any], low: int, span: int) -> tuple[int, int]:
    """A few values from the lowest that is allowed on."""
    lows: list[Any] = [bound.ge for bound in bounds if isinstance(bound, annotated_types.Ge)]
    above: list[Any] = [bound.gt for bound in bounds if isinstance(bound, annotated_types.Gt)]
    low = max([*lows, *(value + 1 for value in above)], default=low)
    highs: list[Any] = [bound.le for bound in bounds if isinstance(bound, annotated_types.Le)]
    below: list[Any] = [bound.lt for bound in bounds if isinstance(bound, annotated_types.Lt)]
    return low, min([low + span, *highs, *(value - 1 for value in below)])
