"""`--set key=value`: single values of a spec replaced from outside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from graphopt.diagnostics import Diagnostic, Place, SpecError, did_you_mean
from graphopt.spec.compose import with_entry
from graphopt.spec.scalars import is_number
from graphopt.spec.yaml import Entry, ListNode, MapNode, Node, ScalarNode, parse_yaml

FIXED = frozenset({"graphopt", "extends", "steps"})
Overrides = Mapping[str, object] | Iterable[str]


def override(root: MapNode, overrides: Overrides, problems: list[Diagnostic]) -> MapNode:
    """Return the tree with the overrides applied in order."""
    if isinstance(overrides, str):
        overrides = [overrides]
    pairs = overrides.items() if isinstance(overrides, Mapping) else ((each, None) for each in overrides)
    for key, value in pairs:
        try:
            one = _Override(f"{key} = {_json(key, value)}") if isinstance(overrides, Mapping) else _Override(key)
            if isinstance(overrides, Mapping):
                one.value = _from_python(value, one.value_place)
            else:
                one.parse()
            root = one.apply(root)
        except SpecError as error:
            problems += error.diagnostics
    return root


def _json(key: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SpecError.of("bad_override", f"the value of '{key}' is not plain data: {error}") from None


def _from_python(value: object, place: Place) -> Node:
    if isinstance(value, Mapping):
        return MapNode({str(key): Entry(place, _from_python(below, place)) for key, below in value.items()}, place)
    if isinstance(value, list | tuple):
        return ListNode(tuple(_from_python(item, place) for item in value), place)
    if value is None or isinstance(value, str | bool) or is_number(value):
        return ScalarNode(value, place)  # type: ignore[arg-type]
    raise SpecError.of("bad_override", f"not plain data: {type(value).__name__}", place)


class _Override:
    def __init__(self, text: str) -> None:
        self.shown = f"--set {text}"
        whole = Place("--set", 0, 1, len(self.shown), self.shown)
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or "\n" in text or "\0" in text:
            raise SpecError.of("bad_override", "an override is key=value", whole, help=("write steps.0.keep=50%",))
        start = len("--set ")
        self.key_place = whole.narrow(start, len(key.rstrip()))
        self.value_place = whole.narrow(start + len(key) + 1, len(value))
        self.path = key.strip().split(".")
        self.value: Node | None = None

    def parse(self) -> None:
        # Leading spaces keep the marks of the value where the user sees it.
        start = self.value_place.col - 1
        document = parse_yaml(" " * start + self.shown[start:], "--set", shown=self.shown)
        if document.problems:
            raise SpecError(*document.problems)
        self.value = ScalarNode(None, self.value_place) if document.root is None else document.root

    def fail(self, message: str, allowed: Iterable[str] = (), given: str = "") -> SpecError:
        names = list(allowed)
        notes = ("allowed: " + ", ".join(names),) if names else ()
        return SpecError.of("bad_override", message, self.key_place, notes=notes, help=did_you_mean(given, names))

    def apply(self, root: MapNode) -> MapNode:
        if (self.path[0] in FIXED and len(self.path) == 1) or self.path[0] in FIXED - {"steps"}:
            raise self.fail(f"'{self.path[0]}' cannot be set from outside")
        changed = self.put(root, self.path, ())
        return changed if isinstance(changed, MapNode) else root

    def put(self, node: Node | None, path: list[str], done: tuple[str, ...]) -> Node:
        if not path:
            return self.value or ScalarNode(None, self.value_place)
        key = path[0]
        if isinstance(node, ListNode):
            index = self.index(node, key, ".".join(done), done == ("steps",))
            below = self.put(node.items[index], path[1:], (*done, key))
            return ListNode((*node.items[:index], below, *node.items[index + 1 :]), node.place)
        if done == () and key == "steps" and isinstance(node, MapNode) and "steps" not in node.entries:
            raise self.fail("the spec has no steps")
        # A word may be short for a mapping (`allocate: global`): setting one of its fields replaces it.
        holder = node if isinstance(node, MapNode) else MapNode({}, self.key_place)
        return with_entry(holder, key, self.put(holder.get(key), path[1:], (*done, key)), self.key_place)

    def index(self, node: ListNode, key: str, name: str, steps: bool) -> int:
        if key.isdecimal() and int(key[:9]) < len(node.items):
            return int(key[:9])
        ids = step_ids(node.items) if steps else []
        if key in ids:
            return ids.index(key)
        allowed = [*ids, *([f"0..{len(node.items) - 1}"] if node.items else [])]
        raise self.fail(f"'{name}' has no item '{key}'", allowed, key)


def step_ids(steps: Iterable[Node]) -> list[str]:
    """Return the id of each step: its own, else its pass's name, numbered where that is taken."""
    own: list[str | None] = []
    uses: list[str] = []
    for step in steps:
        given = step.get("id") if isinstance(step, MapNode) else None
        use = step.get("use") if isinstance(step, MapNode) else None
        own.append(given.value if isinstance(given, ScalarNode) and isinstance(given.value, str) else None)
        uses.append(use.value if isinstance(use, ScalarNode) and isinstance(use.value, str) else "step")
    taken = {each for each in own if each is not None}
    ids = []
    for given_id, use_name in zip(own, uses, strict=True):
        name, number = use_name, 1
        while given_id is None and name in taken:
            number += 1
            name = f"{use_name}_{number}"
        taken.add(name if given_id is None else given_id)
        ids.append(name if given_id is None else given_id)
    return ids
