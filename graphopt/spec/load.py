"""From a spec file to typed settings and steps; everything that is wrong with it is reported at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from graphopt.diagnostics import Diagnostic, Place, SpecError
from graphopt.spec.compose import Composer, SourceFile, compose_named
from graphopt.spec.explain import Subject, explain, unknown
from graphopt.spec.model import Spec, StepHead, Where
from graphopt.spec.overrides import Overrides, override, step_ids
from graphopt.spec.paths import not_found
from graphopt.spec.yaml import ListNode, MapNode, Node, ScalarNode, find, plain, walk
from graphopt.spec.yaml import Path as NodePath

M = TypeVar("M", bound=BaseModel)
_HEAD = tuple(StepHead.model_fields)


class Registry(Protocol):
    """The passes that a spec may name: each a pydantic model whose fields are its options."""

    def names(self) -> Iterable[str]:
        """Return every registered name."""
        ...

    def get(self, name: str, /) -> type[BaseModel]:
        """Return the pass of a registered name."""
        ...


@dataclass(frozen=True)
class StepSpec:
    """One step as it will run: its options as written and as the pass read them, and where each stands."""

    index: int
    use: str
    id: str
    optional: bool
    where: Where | None
    options: dict[str, Any]
    config: BaseModel
    place: Place
    node: MapNode = field(repr=False, compare=False)

    @property
    def origin(self) -> str:
        """The file that says this step."""
        return self.node.place.file

    @property
    def spans(self) -> dict[NodePath, Place]:
        """The place of every value of the step, by its path."""
        return {path: node.place for path, node in walk(self.node)}

    def place_of(self, *path: str | int) -> Place:
        """Return the place of a value, or of the closest one around it."""
        node, depth = find(self.node, path)
        return node.place if depth else self.place


@dataclass(frozen=True)
class LoadedSpec:
    """A valid spec, its steps, the files it was made from and the place of everything in it."""

    spec: Spec
    steps: tuple[StepSpec, ...]
    file: str
    files: tuple[SourceFile, ...]
    root: MapNode = field(repr=False, compare=False)

    def place_of(self, *path: str | int) -> Place:
        """Return the place of a value, or of the closest one around it."""
        return find(self.root, path)[0].place

    def resolved(self) -> dict[str, Any]:
        """Return the whole spec as plain values, with nothing left to inherit."""
        values = plain(self.root)
        return {key: value for key, value in values.items() if key != "extends"}


def load_spec(
    path: str | Path, overrides: Overrides = (), *, registry: Registry, check_files: bool = True
) -> LoadedSpec:
    """Return the spec in a file, composed, overridden and validated; all that is wrong raises one SpecError."""
    composer = Composer()
    return _load(composer, lambda: compose_named(composer, path), str(path), overrides, registry, check_files)


def parse_spec(
    text: str,
    overrides: Overrides = (),
    *,
    registry: Registry,
    file: str = "<text>",
    check_files: bool = True,
) -> LoadedSpec:
    """Return the spec in a text that stands for a file; all that is wrong raises one SpecError."""
    composer = Composer()
    return _load(composer, lambda: composer.compose_text(text, file), file, overrides, registry, check_files)


def _load(
    composer: Composer, compose: Any, file: str, overrides: Overrides, registry: Registry, check_files: bool
) -> LoadedSpec:
    problems = composer.problems
    try:
        root: MapNode | None = compose()
    except SpecError as error:
        problems += error.diagnostics
        root = None
    if root is None:
        raise _all(problems)
    root = override(root, overrides, problems)
    for part in composer.parts.values():
        problems += [each for each in _spec(part)[1] if each.code != "missing_field" or "'graphopt'" in each.message]
    spec, found = _spec(root)
    problems += found
    steps = list(_steps(root, registry, problems))
    if check_files:
        problems += _missing_data(root)
    if problems or spec is None:
        raise _all(problems)
    return LoadedSpec(spec, tuple(steps), file, tuple(composer.files.values()), root)


def _all(problems: list[Diagnostic]) -> SpecError:
    """Sort by file and line, so that the list reads like the files; a file taken twice says its errors once."""
    files = list(dict.fromkeys(each.place.file for each in problems if each.place))

    def order(each: Diagnostic) -> tuple[int, int, int]:
        if each.place is None:
            return -1, 0, 0
        place = each.place
        # Arguments have no lines: they stay in their order.
        return files.index(place.file), place.line, place.col if place.line else 0

    unique = sorted(dict.fromkeys(problems), key=order)
    return SpecError(*unique)


def _validate(
    model: type[M], values: dict[str, Any], root: Node, subject: Subject, problems: list[Diagnostic]
) -> M | None:
    try:
        # A spec is JSON-like, and JSON mode is where strict pydantic takes a list for a tuple and a word for an enum.
        return model.model_validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        problems += explain(error, root, model, subject)
        return None


def _spec(root: MapNode) -> tuple[Spec | None, list[Diagnostic]]:
    problems: list[Diagnostic] = []
    spec = _validate(Spec, plain(root), root, Subject("the spec", root.place), problems)
    return spec, problems


def _steps(root: MapNode, registry: Registry, problems: list[Diagnostic]) -> Iterator[StepSpec]:
    steps = root.get("steps")
    items = steps.items if isinstance(steps, ListNode) else ()
    first: dict[str, Place] = {}
    for index, (node, identity) in enumerate(zip(items, step_ids(items), strict=True)):
        if not isinstance(node, MapNode):
            continue
        given = node.get("id")
        if given is not None and identity in first:
            note = f"first given in {first[identity]}"
            problems.append(Diagnostic("repeated_id", f"repeated id '{identity}'", given.place, (note,)))
        first.setdefault(identity, node.place if given is None else given.place)
        step = _step(index, node, identity, registry, problems)
        if step is not None:
            yield step


def _step(index: int, node: MapNode, identity: str, registry: Registry, problems: list[Diagnostic]) -> StepSpec | None:
    use = node.get("use")
    place = node.place if use is None else use.place
    names = sorted(registry.names())
    values: dict[str, Any] = plain(node)
    head = {key: value for key, value in values.items() if key in _HEAD}
    if use is None:
        notes = ("passes: " + ", ".join(names),)
        problems.append(Diagnostic("missing_field", "a step has no 'use'", place, notes, ("write '- use: PASS'",)))
        return None
    common = _validate(StepHead, head, node, Subject("the step", place), problems)
    if not isinstance(use, ScalarNode) or not isinstance(use.value, str):
        return None
    if use.value not in names:
        problems.append(unknown("pass", use.value, names, place))
        return None
    kind = registry.get(use.value)
    # A pass may want a common field for itself, such as `where`.
    wanted = {field.alias or name for name, field in kind.model_fields.items()}
    options = {key: value for key, value in values.items() if key not in _HEAD or key in wanted}
    more = tuple(key for key in _HEAD if key not in wanted)
    config = _validate(kind, options, node, Subject(f"pass '{use.value}'", place, more), problems)
    if common is None or config is None:
        return None
    written = {key: value for key, value in values.items() if key not in _HEAD}
    return StepSpec(index, use.value, identity, common.optional, common.where, written, config, place, node)


def _missing_data(root: MapNode) -> Iterator[Diagnostic]:
    for section in ("calibration", "evaluation"):
        data, depth = find(root, (section, "data"))
        path = data.value if depth == 2 and isinstance(data, ScalarNode) else None
        if isinstance(path, str) and not os.path.isfile(path):
            yield not_found(path, data.place)


def used_data(loaded: LoadedSpec) -> Mapping[str, str]:
    """Return the data files that a spec names, by the section that names them."""
    sections = {"calibration": loaded.spec.calibration, "evaluation": loaded.spec.evaluation}
    return {name: section.data for name, section in sections.items() if section is not None}
