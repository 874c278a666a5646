"""Dimension labels: what every axis of every tensor is made of.

An axis is a product of atoms (row-major); an atom may turn out to be a product (a width is heads x head size) or a sum
(a packed projection is queries then keys then values) of smaller ones, and two atoms that must have the same indices
are one (union-find). A cut of one leaf then says exactly which indices of every weight go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Dyn:
    """A factor whose size is symbolic (batch, sequence): never cut."""

    __slots__ = ("expr",)

    def __init__(self, expr: Any) -> None:
        self.expr = expr

    def __repr__(self) -> str:
        return f"<{self.expr}>"


class Atom:
    """A factor of fixed size; `parts` is how it was refined, `locks` why it must not be cut."""

    __slots__ = ("locks", "parent", "parts", "rank", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Atom | None = None
        self.parts: Parts | None = None
        self.locks: list[str] = []
        self.rank = 0

    def __repr__(self) -> str:
        root = find(self)
        return f"{root.size}" if root.parts is None else f"{root.size}={root.parts.kind}{root.parts.axes}"


class Choice(str):
    """A lock that tells a choice from mixing: nothing but a score at minus infinity says that an entry is not there."""

    __slots__ = ()


Axis = tuple[Atom | Dyn, ...]


@dataclass
class Parts:
    """A refinement: `product` (one axis) or `sum` (its pieces in order)."""

    kind: str
    axes: list[Axis]


@dataclass(frozen=True)
class Keep:
    """Which indices of a leaf stay; with `by`, one row of `table` for each index of the atom `by`."""

    table: Indices
    by: Atom | None = None

    @property
    def size(self) -> int:
        """How many stay (of each row)."""
        return int(self.table.shape[-1])


def find(atom: Atom) -> Atom:
    """The representative of an atom."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def flat(axis: Axis) -> list[Atom | Dyn]:
    """Factors of an axis with products opened; sums stay atoms."""
    result: list[Atom | Dyn] = []
    for factor in axis:
        if isinstance(factor, Dyn):
            result.append(factor)
            continue
        root = find(factor)
        if root.parts is not None and root.parts.kind == "product":
            result.extend(flat(root.parts.axes[0]))
        else:
            result.append(root)
    return result


def size_of(axis: Axis) -> int:
    """Product of the fixed factors."""
    total = 1
    for factor in axis:
        if isinstance(factor, Atom):
            total *= find(factor).size
    return total


def lock(axis: Axis | Sequence[Atom | Dyn], reason: str) -> None:
    """Forbid cuts of every factor of an axis."""
    for factor in axis:
        if isinstance(factor, Atom):
            root = find(factor)
            if reason not in root.locks:
                root.locks.append(reason)


def union(first: Atom, second: Atom, reason: str) -> None:
    """Make two atoms of one size the same; what cannot be reconciled is locked with `reason`."""
    a, b = find(first), find(second)
    if a is b:
        return
    if a.size != b.size:
        lock((a, b), f"{reason}: sizes {a.size} and {b.size} meet")
        return
    if a.parts is not None and b.parts is not None:
        _reconcile(a, b, reason)
        a, b = find(a), find(b)
        if a is b:
            return
    if a.parts is None and (b.parts is not None or a.rank <= b.rank):
        a, b = b, a
    b.parent = a
    a.rank = max(a.rank, b.rank + 1)
    a.locks.extend(word for word in b.locks if word not in a.locks)


def _reconcile(a: Atom, b: Atom, reason: str) -> None:
    assert a.parts is not None
    assert b.parts is not None
    kinds = (a.parts.kind, b.parts.kind)
    if kinds == ("product", "product"):
        unify(a.parts.axes[0], b.parts.axes[0], reason)
    elif kinds == ("sum", "sum"):
        pieces = split_sum((a,), [size_of(axis) for axis in b.parts.axes], reason)
        if pieces is None:
            return
        # Splitting a along b's bounds may not refine b along a's: compare piece by piece.
        for mine, theirs in zip(pieces, list(b.parts.axes), strict=True):
            unify(mine, theirs, reason)
    else:
        product, total = (a, b) if kinds[0] == "product" else (b, a)
        assert total.parts is not None
        assert product.parts is not None
        pieces = split_sum(product.parts.axes[0], [size_of(axis) for axis in total.parts.axes], reason)
        if pieces is None:
            lock((a, b), reason)
            return
        for mine, theirs in zip(pieces, list(total.parts.axes), strict=True):
            unify(mine, theirs, reason)


def unify(left: Axis, right: Axis, reason: str) -> None:
    """Make two axes of one size the same, refining their factors until they correspond."""
    a, b = flat(left), flat(right)
    while a and b:
        x, y = a[0], b[0]
        if isinstance(x, Dyn) or isinstance(y, Dyn):
            if isinstance(x, Dyn) and isinstance(y, Dyn):
                a.pop(0)
                b.pop(0)
                continue
            break
        if x.size == y.size:
            union(x, y, reason)
            a.pop(0)
            b.pop(0)
        elif x.size > y.size:
            halves = split_product(x, y.size, reason)
            if halves is None:
                break
            a[0:1] = halves
        else:
            halves = split_product(y, x.size, reason)
            if halves is None:
                break
            b[0:1] = halves
    if a or b:
        lock([*a, *b], reason)


def split_product(atom: Atom, outer: int, reason: str) -> list[Atom] | None:
    """Refine an atom to outer x rest; None (and locked) when it does not divide."""
    root = find(atom)
    if root.size % outer:
        lock((root,), f"{reason}: {root.size} does not divide into {outer} rows")
        return None
    rest = root.size // outer
    first, second = Atom(outer), Atom(rest)
    for child in (first, second):
        child.locks.extend(root.locks)
    if root.parts is not None and root.parts.kind == "sum":
        sizes = [size_of(axis) for axis in root.parts.axes]
        if all(size % rest == 0 for size in sizes):
            pieces = split_sum((first,), [size // rest for size in sizes], reason)
            assert pieces is not None
            for piece, axis in zip(pieces, root.parts.axes, strict=True):
                unify((*piece, second), axis, reason)
        elif all(rest % size == 0 for size in sizes) and len(set(sizes)) == 1:
            # Each row holds several whole pieces: a row is a sum again, the same for all rows.
            per_row = rest // sizes[0]
            row = split_sum((second,), [sizes[0]] * per_row, reason)
            assert row is not None
            for i, axis in enumerate(root.parts.axes):
                unify(row[i % per_row], axis, reason)
        else:
            lock((root,), f"{reason}: pieces {sizes} do not line up with rows of {rest}")
            return None
    root.parts = Parts("product", [(first, second)])
    return [first, second]


def split_sum(axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis] | None:
    """Cut an axis into consecutive pieces; None (and locked) when the bounds fall inside a factor."""
    if len(sizes) == 1:
        return [axis]
    factors = flat(axis)
    if any(isinstance(factor, Dyn) for factor in factors):
        lock(factors, reason)
        return None
    if len(factors) > 1:
        inner = size_of(tuple(factors[1:]))
        if any(size % inner for size in sizes):
            lock(factors, f"{reason}: bounds fall inside rows of {inner}")
            return None
        outer = split_sum((factors[0],), [size // inner for size in sizes], reason)
        return None if outer is None else [(*piece, *factors[1:]) for piece in outer]
    atom = factors[0]
    assert isinstance(atom, Atom)
    if atom.parts is None:
        pieces: list[Axis] = [(_child(atom, size),) if size != 1 else (_child(atom, 1),) for size in sizes]
        atom.parts = Parts("sum", pieces)
        return pieces
    return _realign(atom, sizes, reason)


def _child(atom: Atom, size: int) -> Atom:
    child = Atom(size)
    child.locks.extend(atom.locks)
    return child


def _realign(atom: Atom, sizes: Sequence[int], reason: str) -> list[Axis] | None:
    assert atom.parts is not None
    queue = list(atom.parts.axes)
    refined: list[Axis] = []
    result: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need > 0:
            piece = queue.pop(0)
            have = size_of(piece)
            if have > need:
                halves = split_sum(piece, [need, have - need], reason)
                if halves is None:
                    return None
                piece, rest = halves
                queue.insert(0, rest)
                have = need
            taken.append(piece)
            refined.append(piece)
            need -= have
        if len(taken) == 1:
            result.append(taken[0])
        else:
            joined = Atom(size)
            joined.parts = Parts("sum", taken)
            result.append((joined,))
    atom.parts = Parts("sum", refined)
    return result


def leaves(axis: Axis) -> Iterator[Atom]:
    """All leaves below an axis, in order, with repeats."""
    for factor in flat(axis):
        if isinstance(factor, Dyn):
            continue
        if factor.parts is None:
            yield factor
        else:
            for piece in factor.parts.axes:
                yield from leaves(piece)


def indices(axis: Axis, keep: Mapping[Atom, Keep]) -> Indices:
    """Indices of a fixed-size axis that stay when leaves are cut as `keep` says (roots as keys)."""
    position = np.zeros(1, dtype=np.int64)
    seen: dict[Atom, Indices] = {}
    for factor in flat(axis):
        if isinstance(factor, Dyn):
            raise ValueError("an axis of symbolic size has no index list")
        chosen = keep.get(factor)
        if factor.parts is not None:
            values = np.tile(_sum_indices(factor.parts, keep), (len(position), 1))
        elif chosen is None:
            values = np.tile(np.arange(factor.size), (len(position), 1))
        elif chosen.by is None:
            values = np.tile(chosen.table, (len(position), 1))
        else:
            values = chosen.table[seen[find(chosen.by)]]
        width = values.shape[1]
        position = (position[:, None] * factor.size + values).reshape(-1)
        seen = {atom: np.repeat(previous, width) for atom, previous in seen.items()}
        seen[factor] = values.reshape(-1)
    return position


def kept_size(axis: Axis, keep: Mapping[Atom, Keep]) -> int:
    """How many indices of a fixed-size axis stay; unlike `indices` it needs no axis that the rows of a table belong to."""
    size = 1
    for factor in flat(axis):
        if isinstance(factor, Dyn):
            raise ValueError("an axis of symbolic size has no index list")
        if factor.parts is not None:
            size *= sum(kept_size(piece, keep) for piece in factor.parts.axes)
        else:
            chosen = keep.get(factor)
            size *= factor.size if chosen is None else chosen.size
    return size


def _sum_indices(parts: Parts, keep: Mapping[Atom, Keep]) -> Indices:
    found, offset = [], 0
    for piece in parts.axes:
        found.append(indices(piece, keep) + offset)
        offset += size_of(piece)
    return np.concatenate(found)


@dataclass
class LockedLeaves:
    """Locks that leaves inherit from the atoms they refine."""

    reasons: dict[Atom, list[str]] = field(default_factory=dict)

    def visit(self, axis: Axis, inherited: tuple[str, ...] = ()) -> None:
        """Push locks of an axis's atoms down to its leaves."""
        for factor in axis:
            if isinstance(factor, Dyn):
                continue
            root = find(factor)
            reasons = (*inherited, *(word for word in root.locks if word not in inherited))
            if root.parts is None:
                known = self.reasons.setdefault(root, [])
                known.extend(word for word in reasons if word not in known)
            else:
                for piece in root.parts.axes:
                    self.visit(piece, reasons)


def coordinates(axis: Axis, leaf: Atom) -> Indices:
    """For every index of an axis, which index of `leaf` it belongs to, or -1 where the leaf takes no part."""
    wanted = find(leaf)
    result = np.full(1, -1, dtype=np.int64)
    for factor in flat(axis):
        if isinstance(factor, Dyn):
            raise ValueError("an axis of symbolic size has no coordinates")
        if factor.parts is not None:
            inner = np.concatenate([coordinates(piece, leaf) for piece in factor.parts.axes])
        elif factor is wanted:
            inner = np.arange(factor.size)
        else:
            inner = np.full(factor.size, -1)
        result = np.where(inner[None, :] >= 0, inner[None, :], result[:, None]).reshape(-1)
    return result
