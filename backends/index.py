"""Index arithmetic of generated kernels: where in a tensor each element of a tile lies, as Triton text.

An `Index` is one coordinate. Reshapes keep the structure of merged coordinates, so that splitting what was merged gives
back the parts instead of divisions and remainders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

Size = Any  # an int, or a sympy expression in the graph's symbols


class Unfusable(Exception):
    """What was asked for cannot be one kernel; the text says why."""


@dataclass(frozen=True)
class Index:
    """One coordinate: its Triton text and the tile axes that it varies over.

    `parts` are the coordinates and sizes that it merges; `origin` says which piece of which position it is.
    """

    text: str
    axes: frozenset[str] = frozenset()
    parts: tuple[tuple[Index, Size], ...] = field(default=(), compare=False)
    origin: tuple[Index, tuple[Size, ...], int] | None = field(default=None, compare=False)

    @property
    def constant(self) -> int | None:
        """Its value where it is a plain number."""
        return int(self.text) if self.text.lstrip("-").isdigit() else None


ZERO = Index("0")


def sizes_of(value: torch.Tensor) -> tuple[Size, ...]:
    """The shape of a fake tensor as ints and sympy expressions."""
    return tuple(expression(size) for size in value.shape)


def expression(size: Any) -> Size:
    """An int or a sympy expression of a size that torch gives as int or SymInt."""
    if isinstance(size, int):
        return size
    found = size.node.expr
    return int(found) if found.is_Integer else found


def product(sizes: Sequence[Size]) -> Size:
    """The number of elements."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return int(result) if isinstance(result, sympy.Integer) else result


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal whatever the symbols are."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(sympy.expand(left - right) == 0)


def text_of(size: Size) -> str:
    """A size as Python text; bracketed where it is no atom."""
    if isinstance(size, int):
        return str(size)
    text = str(PythonPrinter().doprint(size))
    return text if text.isidentifier() else f"({text})"


def add(left: Index, right: Index) -> Index:
    """left + right."""
    if left.text == "0":
        return right
    if right.text == "0":
        return left
    if left.constant is not None and right.constant is not None:
        return Index(str(left.constant + right.constant))
    return Index(f"({left.text} + {right.text})", left.axes | right.axes)


def times(index: Index, size: Size) -> Index:
    """index * size."""
    if index.text == "0" or same(size, 1):
        return index
    if index.constant is not None and isinstance(size, int):
        return Index(str(index.constant * size))
    return Index(f"{index.text} * {text_of(size)}", index.axes)


def quotient(index: Index, size: int) -> Index:
    """index // size."""
    if size == 1 or index.text == "0":
        return index
    if index.constant is not None:
        return Index(str(index.constant // size))
    return Index(f"(({index.text}) // {size})", index.axes)


def both(left: Index | None, right: Index | None) -> Index | None:
    """Where both hold; None is everywhere."""
    texts = [each for each in (left, right) if each is not None and each.text]
    if not texts:
        return None
    return Index(" & ".join(each.text for each in texts), frozenset().union(*(each.axes for each in texts)))


def bare(text: str) -> str:
    """Text without one outer pair of brackets."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


def linear(indices: Sequence[Index], sizes: Sequence[Size]) -> Index:
    """The row-major position of a coordinate tuple."""
    kept = [(i, s) for i, s in zip(indices, sizes, strict=True) if not same(s, 1)]
    if not kept:
        return ZERO
    if len(kept) == 1:
        return kept[0][0]
    whole = _rejoined(kept)
    if whole is not None:
        return whole
    result = ZERO
    for position, (index, _) in enumerate(kept):
        result = add(result, times(index, product([s for _, s in kept[position + 1 :]])))
    return Index(result.text, result.axes, tuple(kept))


def _rejoined(kept: Sequence[tuple[Index, Size]]) -> Index | None:
    """The position that consecutive pieces were split from, or its part that they make up."""
    first = kept[0][0].origin
    if first is None:
        return None
    source, sizes, start = first
    for offset, (index, size) in enumerate(kept):
        place = start + offset
        if index.origin is None or index.origin[0] != source or index.origin[2] != place:
            return None
        if place >= len(sizes) or len(index.origin[1]) != len(sizes) or not same(size, sizes[place]):
            return None
    end = start + len(kept)
    if start == 0 and end == len(sizes):
        return source
    return Index(_piece(source, sizes, start, end), source.axes, tuple(kept))


def _piece(source: Index, sizes: Sequence[Size], start: int, end: int) -> str:
    rest = product(sizes[end:])
    text = source.text if same(rest, 1) else f"{source.text} // {text_of(rest)}"
    if start:
        text = (
            f"({text}) % {text_of(product(sizes[start:end]))}"
            if "//" in text
            else f"{text} % {text_of(product(sizes[start:end]))}"
        )
    return f"({text})"


def split(index: Index, sizes: Sequence[Size]) -> list[Index]:
    """The coordinates in a row-major block of `sizes` of one position."""
    wide = tuple(s for s in sizes if not same(s, 1))
    if len(wide) == 1:
        pieces = [index]
    else:
        chunks = _chunks([s for _, s in index.parts], wide) if index.parts else None
        if chunks is not None and len(chunks) > 1:
            pieces = []
            for (a, b), (c, d) in chunks:
                inner = index.parts[a:b]
                pieces += split(linear([i for i, _ in inner], [s for _, s in inner]), wide[c:d])
        else:
            pieces = [_split_piece(index, wide, position) for position in range(len(wide))]
    found = iter(pieces)
    return [ZERO if same(s, 1) else next(found) for s in sizes]


def _split_piece(index: Index, wide: tuple[Size, ...], position: int) -> Index:
    rest, size = product(wide[position + 1 :]), wide[position]
    if index.constant is not None and isinstance(rest, int) and isinstance(size, int):
        return Index(str(index.constant // rest % size))
    return Index(_piece(index, wide, position, position + 1), index.axes, origin=(index, wide, position))


def _chunks(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Shortest runs of two shapes without ones that have equal products; None when the wholes differ."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while not same(left := product(old[a:i]), right := product(new[b:j])):
            if i < len(old) and (_divides(left, right) or j == len(new)):
                i += 1
            elif j < len(new):
                j += 1
            else:
                return None
        found.append(((a, i), (b, j)))
    return found


def _divides(left: Size, right: Size) -> bool:
    """Whether `left` is known to be a smaller factor of `right`."""
    if isinstance(left, int) and isinstance(right, int):
        return left < right
    ratio = sympy.cancel(sympy.sympify(right) / left)
    return bool(sympy.denom(ratio) == 1)


def reshape(indices: Sequence[Index], old: Sequence[Size], new: Sequence[Size]) -> list[Index]:
    """Coordinates in the shape `new` of the element that has coordinates `indices` in the shape `old`.

    Raises Unfusable when the two shapes have different numbers of elements.
    """
    if len(old) == len(new) and all(same(a, b) for a, b in zip(old, new, strict=True)):
        return list(indices)
    if not same(product(old), product(new)):
        raise Unfusable(f"{list(old)} does not reshape to {list(new)}")
    kept = [(i, s) for i, s in zip(indices, old, strict=True) if not same(s, 1)]
    wide = [s for s in new if not same(s, 1)]
    chunks = _chunks([s for _, s in kept], wide) or [((0, len(kept)), (0, len(wide)))]
    pieces: list[Index] = []
    for (a, b), (c, d) in chunks:
        pieces += split(linear([i for i, _ in kept[a:b]], [s for _, s in kept[a:b]]), wide[c:d])
    found = iter(pieces)
    return [ZERO if same(s, 1) else next(found) for s in new]
