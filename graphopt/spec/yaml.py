"""Strict YAML 1.2: a tree of values that all know where they stand, and nothing that can surprise or explode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from graphopt.diagnostics import Diagnostic, Place, SpecError
from graphopt.spec.scalars import ScalarError, describe, resolve_plain

LARGEST_FILE = 1 << 20
DEEPEST = 32
MOST_NODES = 20_000
# PyYAML counts all of these as line breaks, so the lines shown must be split at the same ones.
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A value; `text_at` is how far into its place its text begins, None where the text is not shown as it is."""

    value: bool | int | float | str | None
    place: Place
    text_at: int | None = None

    def part(self, start: int, length: int | None) -> Place:
        """Return the place of a part of the text."""
        if self.text_at is None or length is None:
            return self.place
        return self.place.narrow(self.text_at + start, length)


@dataclass(frozen=True, slots=True)
class ListNode:
    """A list."""

    items: tuple[Node, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class Entry:
    """A value of a mapping and the place of its key."""

    key: Place
    node: Node


@dataclass(frozen=True, slots=True)
class MapNode:
    """A mapping."""

    entries: dict[str, Entry]
    place: Place

    def get(self, key: str) -> Node | None:
        """Return the value under a key, or None."""
        entry = self.entries.get(key)
        return None if entry is None else entry.node


@dataclass(frozen=True, slots=True)
class BrokenNode:
    """A value that was refused and reported; nothing more is said about it."""

    place: Place


Node = ScalarNode | ListNode | MapNode | BrokenNode


@dataclass(frozen=True, slots=True)
class Document:
    """A tree, or None where nothing could be read, and everything that is wrong with it."""

    root: Node | None
    problems: tuple[Diagnostic, ...]


def plain(node: Node) -> Any:
    """Return a tree as plain values."""
    if isinstance(node, MapNode):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, ListNode):
        return [plain(item) for item in node.items]
    return node.value if isinstance(node, ScalarNode) else None


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Yield every value of a tree with its path, the root first."""
    yield path, node
    if isinstance(node, MapNode):
        for key, entry in node.entries.items():
            yield from walk(entry.node, (*path, key))
    elif isinstance(node, ListNode):
        for index, item in enumerate(node.items):
            yield from walk(item, (*path, index))


def find(node: Node, path: Path) -> tuple[Node, int]:
    """Return the deepest value on a path and how many elements of the path lead to it."""
    for depth, element in enumerate(path):
        if isinstance(node, MapNode) and element in node.entries:
            node = node.entries[str(element)].node
        elif isinstance(node, ListNode) and isinstance(element, int) and 0 <= element < len(node.items):
            node = node.items[element]
        else:
            return node, depth
    return node, len(path)


def decode(raw: bytes, file: str) -> str:
    """Return the text of a file; too large a file or one that is not UTF-8 raises SpecError."""
    if len(raw) > LARGEST_FILE:
        raise SpecError.of("yaml_size", f"a spec is at most 1 MiB, {file} is larger")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig")
        lines = _LINE_BREAK.split(before)
        place = Place(file, len(lines), len(lines[-1]) + 1)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise SpecError.of("yaml_encoding", message, place, help=("save the file as UTF-8",)) from None


def parse_yaml(text: str, file: str, *, shown: str | None = None) -> Document:
    """Return the tree of a YAML text; with `shown`, the text is the tail of that command-line argument."""
    if len(text) > LARGEST_FILE:
        raise SpecError.of("yaml_size", f"a spec is at most 1 MiB, {file} is larger")
    reader = _Reader(text, file, shown)
    try:
        root = reader.document()
    except SpecError as error:
        return Document(None, (*reader.problems, *error.diagnostics))
    except yaml.reader.ReaderError as error:
        return Document(None, (reader.unreadable(error),))
    except yaml.MarkedYAMLError as error:
        return Document(None, (*reader.problems, reader.syntax(error)))
    return Document(root, tuple(reader.problems))


class _TooDeep(yaml.MarkedYAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """The scanner looks a thousand characters ahead and is quadratic in open brackets: stop it there already."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= DEEPEST:
            raise _TooDeep(problem=f"nested deeper than {DEEPEST} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Reader:
    def __init__(self, text: str, file: str, shown: str | None) -> None:
        self.text = text
        self.file = file
        self.lines = _LINE_BREAK.split(text) if shown is None else [shown]
        self.first_line = 1 if shown is None else 0
        self.problems: list[Diagnostic] = []
        self.events: Iterator[Any] = iter(())
        self.nodes = 0

    def document(self) -> Node | None:
        self.events = iter(yaml.parse(self.text, Loader=_Loader))
        next(self.events)
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            return None
        if start.tags or start.version not in (None, (1, 2)):
            self.refuse("yaml_directive", "YAML directives are not allowed", self.place(start))
        root = self.node(next(self.events), 1)
        next(self.events)
        after = next(self.events)
        if isinstance(after, yaml.DocumentStartEvent):
            self.stop("yaml_documents", "a spec is one YAML document, this is a second one", self.place(after))
        return root

    def node(self, event: Any, depth: int) -> Node:
        place = self.place(event)
        self.nodes += 1
        if self.nodes > MOST_NODES:
            self.stop("yaml_nodes", f"more than {MOST_NODES} values", place)
        if isinstance(event, yaml.AliasEvent):
            self.refuse(
                "yaml_alias",
                f"aliases are not allowed: '*{event.anchor}'",
                place,
                help="write the value out; quote a glob",
            )
            return BrokenNode(place)
        if event.anchor is not None:
            help = "write the value where it is used, or use 'extends'"
            self.refuse("yaml_anchor", f"anchors are not allowed: '&{event.anchor}'", place, help=help)
        if event.tag is not None:
            self.refuse("yaml_tag", f"tags are not allowed: {event.tag!r}", place, help="write the value alone")
        broken = event.tag is not None
        if isinstance(event, yaml.ScalarEvent):
            return BrokenNode(place) if broken else self.scalar(event, place)
        if depth > DEEPEST:
            self.stop("yaml_depth", f"nested deeper than {DEEPEST} levels", place)
        node = (self.list if isinstance(event, yaml.SequenceStartEvent) else self.mapping)(event, place, depth)
        return BrokenNode(node.place) if broken else node

    def scalar(self, event: Any, place: Place) -> Node:
        quoted = not event.implicit[0]
        text_at = 1 if quoted else 0
        raw = self.text[event.start_mark.index : event.end_mark.index]
        try:
            event.value.encode()
            value = event.value if quoted else resolve_plain(event.value)
        except UnicodeEncodeError:
            self.refuse("yaml_encoding", "half a surrogate pair is not a character", place)
            return BrokenNode(place)
        except ScalarError as error:
            self.problems += error.at(place).diagnostics
            return BrokenNode(place)
        return ScalarNode(value, place, text_at if raw[text_at : len(raw) - text_at] == event.value else None)

    def list(self, event: Any, place: Place, depth: int) -> ListNode:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return ListNode(tuple(items), self.span(place, event))

    def mapping(self, event: Any, place: Place, depth: int) -> MapNode:
        entries: dict[str, Entry] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            merge = isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<"
            key = self.node(event, depth + 1)
            node = self.node(next(self.events), depth + 1)
            if merge:
                self.refuse("yaml_merge", "merge keys are not allowed: '<<'", key.place, help="use 'extends'")
            elif isinstance(key, ScalarNode) and isinstance(key.value, str):
                if key.value in entries:
                    first = entries[key.value].key
                    note = f"first given in line {first.line}, column {first.col}"
                    self.refuse("repeated_key", f"repeated key '{key.value}'", key.place, note=note)
                else:
                    entries[key.value] = Entry(key.place, node)
            elif not isinstance(key, BrokenNode):
                self.refuse("yaml_key", f"a key is text, not {describe(plain(key))}", key.place, help="quote it")
        return MapNode(entries, self.span(place, event))

    def place(self, event: Any) -> Place:
        start, end = event.start_mark, event.end_mark
        line = self.lines[start.line] if start.line < len(self.lines) else ""
        stop = end.column if end.line == start.line else len(line)
        return Place(self.file, start.line + self.first_line, start.column + 1, max(1, stop - start.column), line)

    def span(self, place: Place, end: Any) -> Place:
        """A block collection starts at its first entry and has no brackets: show that line to its end."""
        source = place.source or ""
        mark = end.end_mark
        flow = source[place.col - 1 : place.col] in ("[", "{") and mark.line + self.first_line == place.line
        stop = mark.column if flow else len(source.rstrip())
        return place.narrow(0, stop - place.col + 1)

    def refuse(self, code: str, message: str, place: Place, *, note: str = "", help: str = "") -> None:
        notes, helps = ((note,) if note else ()), ((help,) if help else ())
        self.problems.append(Diagnostic(code, message, place, notes, helps))

    def stop(self, code: str, message: str, place: Place) -> NoReturn:
        raise SpecError.of(code, message, place)

    def unreadable(self, error: yaml.reader.ReaderError) -> Diagnostic:
        lines = _LINE_BREAK.split(self.text[: error.position])
        source = self.lines[min(len(lines), len(self.lines)) - 1]
        place = Place(self.file, len(lines) - 1 + self.first_line, len(lines[-1]) + 1, 1, source)
        code_point = f"U+{ord(self.text[error.position]):04X}"
        return Diagnostic("yaml_character", f"the character {code_point} is not allowed", place)

    def syntax(self, error: yaml.MarkedYAMLError) -> Diagnostic:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "not YAML"
        place = None
        if mark is not None:
            # At the end of the text the mark may stand after the last line; the last line says more.
            row = min(mark.line, len(self.lines) - 1)
            while row and mark.index >= len(self.text) and not self.lines[row].strip():
                row -= 1
            column = mark.column if row == mark.line else len(self.lines[row])
            place = Place(self.file, row + self.first_line, column + 1, 1, self.lines[row])
        if isinstance(error, _TooDeep):
            return Diagnostic("yaml_depth", problem, place)
        if "'\\t'" in problem:
            return Diagnostic("yaml_tab", "a tab cannot indent YAML", place, (), ("use spaces",))
        notes: tuple[str, ...] = ()
        if "alias" in (error.context or ""):
            help = "quote a glob: '**.mlp'"
            return Diagnostic("yaml_alias", "a value that begins with '*' is an alias", place, (), (help,))
        if error.context and error.context_mark is not None and self.first_line:
            notes = (f"{error.context}, line {error.context_mark.line + self.first_line}",)
        return Diagnostic("yaml_syntax", problem, place, notes)
