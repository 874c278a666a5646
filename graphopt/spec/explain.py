"""pydantic's errors as diagnostics with places."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from graphopt.diagnostics import Diagnostic, Place, did_you_mean
from graphopt.spec.scalars import ScalarError, describe
from graphopt.spec.yaml import BrokenNode, MapNode, Node, Path, ScalarNode, find, plain

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "nothing",
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items"),
    "too_long": ("max_length", "at most", "items"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}
_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is being validated: how messages name it, where it stands, and names it takes beside its model's."""

    name: str
    place: Place
    more_fields: tuple[str, ...] = ()


def explain(error: ValidationError, root: Node, model: type[BaseModel], subject: Subject) -> list[Diagnostic]:
    """Return what pydantic found, each error at its place in the tree."""
    explained: dict[Path, list[Diagnostic]] = {}
    unions: set[Path] = set()
    for each in error.errors(include_url=False):
        path, labelled = _path(root, tuple(each["loc"]), each["type"])
        node, _ = find(root, path)
        if isinstance(node, BrokenNode):
            continue
        explained.setdefault(path, []).append(_Explainer(root, model, subject, path, node).diagnostic(dict(each)))
        if labelled:
            unions.add(path)
    return [one for path, found in explained.items() for one in _joined(found, path in unions)]


def _joined(found: list[Diagnostic], union: bool) -> list[Diagnostic]:
    """The members of a union each say why they refuse a value: that is one error."""
    if len(found) == 1 or not union:
        return found
    first = found[0]
    notes = tuple(dict.fromkeys(f"either: {one.message}" for one in found))
    helps = tuple(dict.fromkeys(text for one in found for text in one.help))
    return [Diagnostic("bad_value", "no allowed form fits this value", first.place, notes, helps)]


def _path(root: Node, loc: Path, kind: str) -> tuple[Path, bool]:
    """Leave out what pydantic adds to a location, such as union tags, and whether the last element was one."""

    def search(node: Node, rest: Path) -> Iterator[tuple[Path, bool]]:
        if not rest:
            yield (), False
            return
        if find(node, rest[:1])[1]:
            below = find(node, rest[:1])[0]
            for path, labelled in search(below, rest[1:]):
                yield (rest[0], *path), labelled
        if kind == "missing" and len(rest) == 1:
            yield rest, False
        for path, labelled in search(node, rest[1:]):
            yield path, labelled or len(rest) == 1

    # The longest reading explains most; a last element that is in the tree is better than one that is a label.
    return max(search(root, loc), key=lambda reading: (len(reading[0]), not reading[1]))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _literals(model: type[BaseModel]) -> set[object]:
    return {value for field in model.model_fields.values() for value in typing.get_args(field.annotation)}


def _fields_of(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield field.alias or name, field.annotation


class _Explainer:
    def __init__(self, root: Node, model: type[BaseModel], subject: Subject, path: Path, node: Node) -> None:
        self.root = root
        self.model = model
        self.subject = subject
        self.path = path
        self.node = node
        self.place = node.place if path else subject.place

    def diagnostic(self, error: dict[str, Any]) -> Diagnostic:
        kind, context = error["type"], error.get("ctx", {})
        if kind == "missing":
            return self.missing()
        if kind == "extra_forbidden":
            return self.unknown_field()
        if kind in ("literal_error", "enum"):
            return self.choice(_QUOTED.findall(context["expected"]) or [str(context["expected"])])
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            return self.tag(context)
        if kind in _EXPECTED:
            return self.said("bad_type", f"must be {_EXPECTED[kind]}, not {describe(plain(self.node))}")
        if kind in _BOUNDS:
            key, words = _BOUNDS[kind]
            return self.said("out_of_range", f"must be {words} {context[key]}, not {describe(plain(self.node))}")
        if kind in _LENGTHS:
            key, words, things = _LENGTHS[kind]
            return self.said("bad_length", f"must have {words} {context[key]} {things}")
        cause = context.get("error")
        if isinstance(cause, ScalarError):
            place = self.place
            if isinstance(self.node, ScalarNode):
                place = self.node.part(cause.start, cause.length)
            return cause.diagnostics[0].at(place)
        if isinstance(cause, Exception):
            return Diagnostic("bad_value", str(cause), self.place)
        if kind == "string_pattern_mismatch":
            return self.said("bad_value", f"must match {context['pattern']}, not {describe(plain(self.node))}")
        return self.said("bad_value", f"is not allowed: {error['msg'][:1].lower()}{error['msg'][1:]}")

    def name(self, path: Path) -> str:
        return ".".join(str(element) for element in path)

    def owner(self, path: Path) -> str:
        return f"'{self.name(path)}' of {self.subject.name}" if path else self.subject.name

    def said(self, code: str, message: str) -> Diagnostic:
        what = f"'{self.name(self.path)}'" if self.path else self.subject.name
        return Diagnostic(code, f"{what} {message}", self.place)

    def fields(self, path: Path) -> list[str]:
        models = [self.model]
        node = self.root
        for element in path:
            if not isinstance(element, int):
                found = [kind for model in models for key, kind in _fields_of(model) if key == element]
                models = [below for annotation in found for below in _models(annotation)]
            node = find(node, (element,))[0]
        if isinstance(node, MapNode) and len(models) > 1:
            values = {entry.node.value for entry in node.entries.values() if isinstance(entry.node, ScalarNode)}
            models = [model for model in models if values & _literals(model)] or models
        names = dict.fromkeys(key for model in models for key, _ in _fields_of(model))
        return [*(() if path else self.subject.more_fields), *names]

    def missing(self) -> Diagnostic:
        path, name = self.path[:-1], str(self.path[-1])
        holder = find(self.root, path)[0]
        place = holder.place if path else self.subject.place
        notes = ("fields: " + ", ".join(self.fields(path)),)
        return Diagnostic("missing_field", f"missing field '{name}' in {self.owner(path)}", place, notes)

    def unknown_field(self) -> Diagnostic:
        path, name = self.path[:-1], str(self.path[-1])
        holder = find(self.root, path)[0]
        place = holder.entries[name].key if isinstance(holder, MapNode) and name in holder.entries else self.place
        fields = self.fields(path)
        return unknown("field", name, fields, place, within=f" in {self.owner(path)}")

    def choice(self, allowed: list[str]) -> Diagnostic:
        value = plain(self.node)
        return unknown("value", value, allowed, self.place, within=f" of '{self.name(self.path)}'", plural="allowed")

    def tag(self, context: dict[str, Any]) -> Diagnostic:
        key = context["discriminator"].strip("'")
        allowed = _QUOTED.findall(context.get("expected_tags", ""))
        place, value = self.place, plain(self.node)
        if isinstance(self.node, MapNode):
            tag = self.node.get(key)
            if tag is None:
                return Diagnostic("missing_field", f"missing field '{key}' in {self.owner(self.path)}", place)
            place, value = tag.place, plain(tag)
        elif not isinstance(value, str):
            return self.said("bad_type", f"must be a mapping with a '{key}', not {describe(value)}")
        return unknown(key, value, allowed, place, within=f" of '{self.name(self.path)}'")


def unknown(
    what: str, given: object, allowed: Iterable[str], place: Place, *, within: str = "", plural: str = ""
) -> Diagnostic:
    """Return the diagnostic for a word that is none of the allowed ones."""
    names = list(allowed)
    shown = f"'{given}'" if isinstance(given, str) and len(given) <= 60 else describe(given)
    heading = plural or (f"{what}es" if what.endswith("s") else f"{what}s")
    return Diagnostic(
        f"unknown_{what}",
        f"unknown {what} {shown}{within}",
        place,
        (f"{heading}: " + (", ".join(names) or "none"),),
        did_you_mean(given, names) if isinstance(given, str) else (),
    )
