"""One tree from a spec and the files it extends and inherits steps from; every value keeps its own place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from graphopt.diagnostics import Diagnostic, Place, SpecError
from graphopt.spec.paths import beside, not_found, problem_in
from graphopt.spec.yaml import LARGEST_FILE, BrokenNode, Entry, ListNode, MapNode, Node, ScalarNode, decode, parse_yaml

DEEPEST_CHAIN = 8
MOST_USES = 256
MOST_STEPS = 256
NOT_INHERITED = frozenset({"graphopt", "name", "description", "extends", "steps"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a spec was made from."""

    path: str
    sha256: str


class Composer:
    """Reads files once each and collects every problem; cycles and excess raise SpecError at once."""

    def __init__(self) -> None:
        self.uses = 0
        self.files: dict[str, SourceFile] = {}
        self.problems: list[Diagnostic] = []
        self.composed: dict[str, MapNode | None] = {}
        self.parts: dict[str, MapNode] = {}

    def compose_file(self, path: str, place: Place | None = None, chain: tuple[str, ...] = ()) -> MapNode | None:
        """Return the composed tree of a file, or None where it cannot be read."""
        real = os.path.realpath(path)
        if real in chain:
            cycle = " -> ".join(os.path.basename(each) for each in (*chain[chain.index(real) :], real))
            raise SpecError.of("spec_cycle", "a spec cannot build on itself", place, notes=(cycle,))
        if len(chain) >= DEEPEST_CHAIN:
            raise SpecError.of("spec_depth", f"specs build on each other more than {DEEPEST_CHAIN} deep", place)
        self.uses += 1
        if self.uses > MOST_USES:
            raise SpecError.of("spec_files", f"specs build on each other more than {MOST_USES} times", place)
        if real not in self.composed:
            text = self.read(path, place)
            self.composed[real] = None if text is None else self.compose_text(text, path, (*chain, real))
        return self.composed[real]

    def read(self, path: str, place: Place | None) -> str | None:
        """Return the text of a file and note its hash, or None."""
        if not os.path.isfile(path):
            self.problems.append(not_found(path, place))
            return None
        try:
            with open(path, "rb") as file:
                raw = file.read(LARGEST_FILE + 1)
            text = decode(raw, path)
        except OSError as error:
            self.refuse("unreadable_file", f"cannot read '{path}': {error.strerror}", place)
            return None
        except SpecError as error:
            self.problems += error.diagnostics
            return None
        self.files[os.path.realpath(path)] = SourceFile(path, hashlib.sha256(raw).hexdigest())
        return text

    def compose_text(self, text: str, file: str, chain: tuple[str, ...] = ()) -> MapNode | None:
        """Return the composed tree of a text that stands in a file, or None."""
        document = parse_yaml(text, file)
        self.problems += document.problems
        root = document.root
        if not isinstance(root, MapNode):
            if root is not None or not document.problems:
                place = Place(file, 1, 1, 1) if root is None else root.place
                help = ("begin with 'graphopt: 1'",)
                self.refuse("not_a_spec", "a spec is a mapping" if root else "the spec is empty", place, help=help)
            return None
        own = self.resolve_paths(root, file)
        merged: MapNode | None = None
        for base in self.inherited(own.get("extends"), file, chain):
            merged = base if merged is None else merge(merged, base)
        steps = own.get("steps")
        if isinstance(steps, ListNode):
            own = with_entry(own, "steps", ListNode(tuple(self.expand(steps, file, chain)), steps.place))
        if merged is None:
            return own
        taken = {key: entry for key, entry in merged.entries.items() if key not in NOT_INHERITED}
        return merge(MapNode(taken, own.place), own)

    def inherited(self, extends: Node | None, file: str, chain: tuple[str, ...]) -> Iterable[MapNode]:
        """Yield the trees that a file extends; what is not a list of texts is refused by the model."""
        for item in extends.items if isinstance(extends, ListNode) else ():
            if isinstance(item, ScalarNode) and isinstance(item.value, str):
                base = self.compose_beside(file, item, item.value, chain)
                if base is not None:
                    self.parts[base.place.file] = base
                    yield base

    def expand(self, steps: ListNode, file: str, chain: tuple[str, ...]) -> list[Node]:
        """Return the steps with inherited ones in their places."""
        expanded: list[Node] = []
        for item in steps.items:
            expanded += self.step(item, file, chain)
            if len(expanded) > MOST_STEPS:
                raise SpecError.of("spec_steps", f"more than {MOST_STEPS} steps", item.place)
        return expanded

    def step(self, item: Node, file: str, chain: tuple[str, ...]) -> list[Node]:
        if not isinstance(item, MapNode) or "from" not in item.entries:
            return [] if isinstance(item, BrokenNode) else [item]
        source = item.entries["from"].node
        for key, entry in item.entries.items():
            if key != "from":
                message = f"a step with 'from' takes no other field: '{key}'"
                self.refuse("unknown_field", message, entry.key, notes=("fields: from",))
        if not isinstance(source, ScalarNode) or not isinstance(source.value, str):
            self.refuse("bad_type", "'from' must be the path of a spec", source.place)
            return []
        tree = self.compose_beside(file, source, source.value, chain)
        if tree is None:
            return []
        self.parts[tree.place.file] = tree
        steps = tree.get("steps")
        if not isinstance(steps, ListNode) or not steps.items:
            self.refuse("no_steps", f"'{source.value}' has no steps to take over", source.place)
            return []
        return list(steps.items)

    def compose_beside(self, file: str, node: ScalarNode, text: str, chain: tuple[str, ...]) -> MapNode | None:
        if problem := problem_in(text, node.place, absolute=False):
            self.problems.append(problem)
            return None
        return self.compose_file(beside(file, text), node.place, chain)

    def resolve_paths(self, root: MapNode, file: str) -> MapNode:
        """Return the tree with paths as seen from outside the file that says them."""
        for section in ("calibration", "evaluation"):
            holder = root.get(section)
            if isinstance(holder, MapNode) and "data" in holder.entries:
                data = self.resolved(holder.entries["data"], file)
                root = with_entry(root, section, with_entry(holder, "data", data))
        model = root.get("model")
        if isinstance(model, ScalarNode) and str(model.value).startswith(("./", "../", "/")):
            root = with_entry(root, "model", self.resolved(root.entries["model"], file))
        return root

    def resolved(self, entry: Entry, file: str) -> Node:
        node = entry.node
        if not isinstance(node, ScalarNode) or not isinstance(node.value, str):
            return node
        if problem := problem_in(node.value, node.place, absolute=True):
            self.problems.append(problem)
            return BrokenNode(node.place)
        return ScalarNode(beside(file, node.value), node.place)

    def refuse(
        self,
        code: str,
        message: str,
        place: Place | None,
        *,
        notes: tuple[str, ...] = (),
        help: tuple[str, ...] = (),
    ) -> None:
        self.problems.append(Diagnostic(code, message, place, notes, help))


def compose_named(composer: Composer, path: str | Path) -> MapNode | None:
    """Return the composed tree of the file a user named."""
    text = str(path)
    if problem := problem_in(text, None, absolute=True):
        composer.problems.append(problem)
        return None
    return composer.compose_file(text)


def with_entry(root: MapNode, key: str, node: Node, place: Place | None = None) -> MapNode:
    """Return a mapping with one value replaced or added."""
    at = root.entries[key].key if key in root.entries and place is None else place or node.place
    return MapNode({**root.entries, key: Entry(at, node)}, root.place)


def merge(base: MapNode, over: MapNode) -> MapNode:
    """Return `base` with the values of `over`; mappings on both sides are merged in turn."""
    entries = dict(base.entries)
    for key, entry in over.entries.items():
        below = base.get(key)
        if isinstance(below, MapNode) and isinstance(entry.node, MapNode):
            entry = Entry(entry.key, merge(below, entry.node))
        entries[key] = entry
    return MapNode(entries, over.place)
