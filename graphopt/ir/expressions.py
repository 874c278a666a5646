"""Expressions of weights: what should become of a tensor, with its shape and dtype known before any data is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

Index = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Expr:
    """A tensor to be: `shape`, storage `dtype` and a recipe."""

    def parts(self) -> tuple[Expr, ...]:
        """The expressions this one reads."""
        return ()

    @property
    def moves(self) -> bool:
        """Whether it only moves values, so that it needs no wider dtype than that of what it reads."""
        return False

    def rows(self, start: int, stop: int) -> Expr | None:
        """An expression of rows `start` to `stop` alone, of the same bits; None when the whole is needed for a part."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.parts()[0].dtype

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Combine evaluated parts, in the floating dtype they come in."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line that a reader of the trail understands."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Source(Expr):
    """An original tensor, by its checkpoint name."""

    name: str
    sizes: tuple[int, ...]
    kind: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return self.sizes

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.kind

    @property
    def moves(self) -> bool:
        """Nothing is computed."""
        return True

    def rows(self, start: int, stop: int) -> Expr:
        """Those rows of the tensor on disk."""
        return Rows(self, start, stop)

    def describe(self) -> str:
        """The checkpoint name."""
        return self.name


@dataclass(frozen=True, eq=False)
class Rows(Expr):
    """Rows `start` to `stop` of an original tensor; the others are not read."""

    part: Source
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return (self.stop - self.start, *self.part.sizes[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.part.kind

    @property
    def moves(self) -> bool:
        """Nothing is computed."""
        return True

    def rows(self, start: int, stop: int) -> Expr:
        """Fewer rows of the same tensor."""
        return Rows(self.part, self.start + start, self.start + stop)

    def describe(self) -> str:
        """Which rows."""
        return f"{self.part.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A tensor computed by a pass (a fold matrix, a mean activation), small enough to hold."""

    value: torch.Tensor
    kind: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.kind

    @property
    def moves(self) -> bool:
        """Whether the value is held as it is stored."""
        return bool(self.value.dtype == self.kind)

    def rows(self, start: int, stop: int) -> Expr:
        """Those rows of the value."""
        return Const(self.value[start:stop], self.kind)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The value itself."""
        return self.value

    def describe(self) -> str:
        """Its shape."""
        return f"const{list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Take(Expr):
    """Keep `index` along `axis`, in that order."""

    part: Expr
    axis: int
    index: Index

    def parts(self) -> tuple[Expr, ...]:
        """The cut expression."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        sizes = list(self.part.shape)
        sizes[self.axis] = len(self.index)
        return tuple(sizes)

    @property
    def moves(self) -> bool:
        """Whether what it selects from does."""
        return self.part.moves

    @cached_property
    def _ordered(self) -> bool:
        return all(first < second for first, second in pairwise(self.index))

    def rows(self, start: int, stop: int) -> Expr | None:
        """The same choice of fewer rows; an axis 0 out of order needs rows from everywhere."""
        if self.axis != 0:
            part = self.part.rows(start, stop)
            return None if part is None else Take(part, self.axis, self.index)
        chosen = self.index[start:stop]
        if not self._ordered or not chosen:
            return None
        low = chosen[0]
        part = self.part.rows(low, chosen[-1] + 1)
        return None if part is None else Take(part, 0, tuple(i - low for i in chosen))

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Select the kept indices."""
        index = torch.tensor(self.index, dtype=torch.long, device=parts[0].device)
        return parts[0].index_select(self.axis, index)

    def describe(self) -> str:
        """What is kept of what."""
        return f"take({self.part.describe()}, axis {self.axis}, {len(self.index)} of {self.part.shape[self.axis]})"


@dataclass(frozen=True, eq=False)
class Cat(Expr):
    """Concatenate along `axis`."""

    pieces: tuple[Expr, ...]
    axis: int

    def parts(self) -> tuple[Expr, ...]:
        """The pieces."""
        return self.pieces

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        sizes = list(self.pieces[0].shape)
        sizes[self.axis] = sum(piece.shape[self.axis] for piece in self.pieces)
        return tuple(sizes)

    @property
    def moves(self) -> bool:
        """Whether all pieces do, in one dtype."""
        return all(piece.moves and piece.dtype == self.dtype for piece in self.pieces)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends = [0]
        for piece in self.pieces:
            ends.append(ends[-1] + piece.shape[0])
        return tuple(ends)

    def rows(self, start: int, stop: int) -> Expr | None:
        """Those rows of the pieces that hold them."""
        found = []
        for piece, low, high in zip(self.pieces, self._ends, self._ends[1:], strict=False):
            first, last = (start, stop) if self.axis else (max(start, low) - low, min(stop, high) - low)
            if first < last:
                found.append(piece.rows(first, last))
        pieces = tuple(piece for piece in found if piece is not None)
        return Cat(pieces, self.axis) if pieces and len(pieces) == len(found) else None

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Concatenate."""
        return torch.cat(parts, dim=self.axis)

    def describe(self) -> str:
        """The pieces."""
        return f"cat({', '.join(piece.describe() for piece in self.pieces)})"


@dataclass(frozen=True, eq=False)
class Affine(Expr):
    """`scale * x + shift` elementwise."""

    part: Expr
    scale: float
    shift: float = 0.0

    def parts(self) -> tuple[Expr, ...]:
        """The scaled expression."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return self.part.shape

    def rows(self, start: int, stop: int) -> Expr | None:
        """The same of fewer rows."""
        part = self.part.rows(start, stop)
        return None if part is None else replace(self, part=part)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Scale and shift."""
        return parts[0] * self.scale + self.shift

    def describe(self) -> str:
        """The formula."""
        return f"{self.scale:.6g} * {self.part.describe()}" + (f" + {self.shift:.6g}" if self.shift else "")


@dataclass(frozen=True, eq=False)
class MatMul(Expr):
    """Matrix product of two expressions; the right one may be a vector."""

    left: Expr
    right: Expr
    kind: torch.dtype

    def parts(self) -> tuple[Expr, ...]:
        """Both factors."""
        return (self.left, self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return (*self.left.shape[:-1], *self.right.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.kind

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Multiply in the wider of the two dtypes."""
        wide = torch.promote_types(parts[0].dtype, parts[1].dtype)
        return parts[0].to(wide) @ parts[1].to(wide)

    def describe(self) -> str:
        """The product."""
        return f"({self.left.describe()} @ {self.right.describe()})"


@dataclass(frozen=True, eq=False)
class Sum(Expr):
    """Elementwise sum of expressions of one shape."""

    terms: tuple[Expr, ...]

    def parts(self) -> tuple[Expr, ...]:
        """The terms."""
        return self.terms

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return self.terms[0].shape

    def rows(self, start: int, stop: int) -> Expr | None:
        """The sum of the terms' rows."""
        found = [term.rows(start, stop) for term in self.terms]
        terms = tuple(term for term in found if term is not None)
        return Sum(terms) if len(terms) == len(found) else None

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Add up."""
        total = parts[0]
        for part in parts[1:]:
            total = total + part.to(total.dtype)
        return total

    def describe(self) -> str:
        """The sum."""
        return " + ".join(term.describe() for term in self.terms)


@dataclass(frozen=True, eq=False)
class BlockMap(Expr):
    """Map groups of slices along `axis` linearly: slice g of the result is sum_i maps[g, i] x[members[g][i]].

    The axis is seen as slices of `size` entries; `maps` `[G, t, out, size]` holds one matrix a member. It expresses
    every KV regrouping: mean (maps = I / t), first, SVD folds.
    """

    part: Expr
    axis: int
    members: tuple[Index, ...]
    maps: torch.Tensor

    def parts(self) -> tuple[Expr, ...]:
        """The mapped expression."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        sizes = list(self.part.shape)
        sizes[self.axis] = len(self.members) * self.maps.shape[2]
        return tuple(sizes)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Gather the members of each group and contract them with their maps."""
        size = self.maps.shape[3]
        x = parts[0].movedim(self.axis, 0)
        slices = x.reshape(x.shape[0] // size, size, -1)
        picked = slices[torch.tensor(self.members, device=x.device)]  # [G, t, size, rest]
        maps = self.maps.to(device=x.device, dtype=picked.dtype)
        mapped = torch.einsum("gtor,gtrx->gox", maps, picked)
        return mapped.reshape(-1, *x.shape[1:]).movedim(0, self.axis)

    def describe(self) -> str:
        """How many slices become how many."""
        old = sum(len(group) for group in self.members)
        return f"map({self.part.describe()}, axis {self.axis}, {old} slices to {len(self.members)})"


@dataclass(frozen=True, eq=False)
class Rearrange(Expr):
    """Read as `sizes`, then put the axes in `order`: a matrix `[E w, d]` as a bank of E matrices `[E, w, d]`."""

    part: Expr
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def parts(self) -> tuple[Expr, ...]:
        """The expression that is read."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return tuple(self.sizes[axis] for axis in self.order)

    @property
    def moves(self) -> bool:
        """Whether what it reads does."""
        return self.part.moves

    def rows(self, start: int, stop: int) -> Expr | None:
        """The same of fewer rows, where an axis that leads stays in front."""
        if self.order[0] != 0 or not self.sizes[0] or self.part.shape[0] % self.sizes[0]:
            return None
        each = self.part.shape[0] // self.sizes[0]
        part = self.part.rows(start * each, stop * each)
        return None if part is None else Rearrange(part, (stop - start, *self.sizes[1:]), self.order)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Reshape and permute."""
        return parts[0].reshape(self.sizes).permute(self.order)

    def describe(self) -> str:
        """The new shape."""
        return f"rearrange({self.part.describe()}, {list(self.shape)})"
