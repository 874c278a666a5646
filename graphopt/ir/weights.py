"""Weights as lazy expressions: a pass records what should become of a tensor, and nothing is computed until it is read.

An expression knows its shape and dtype without data. `WeightStore.evaluate` computes one weight at a time, so that a
model larger than memory converts; the storage dtype rounds exactly once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from graphopt.diagnostics import ArtifactError

Index = tuple[int, ...]


class TensorSource(Protocol):
    """Where original tensors come from: a checkpoint on disk, a module in memory."""

    def get(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`; raises KeyError when there is none."""


@dataclass(frozen=True, eq=False)
class Expr:
    """A tensor to be: `shape`, storage `dtype` and a recipe."""

    def parts(self) -> tuple[Expr, ...]:
        """The expressions this one reads."""
        return ()

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

    def describe(self) -> str:
        """The checkpoint name."""
        return self.name


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

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Select the kept indices."""
        return parts[0].index_select(self.axis, torch.tensor(self.index, dtype=torch.long, device=parts[0].device))

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


@dataclass(frozen=True)
class Weight:
    """One weight of a program: its expression and the checkpoint names that share its storage.

    `kind` is `parameter`, `buffer` (saved) or `constant` (a table such as rotary frequencies, not part of a checkpoint).
    """

    name: str
    expr: Expr
    kind: str = "parameter"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightStore:
    """Checkpoint name to weight; ties are data (`Weight.aliases`).

    `source` supplies original tensors; a program captured for its shapes alone has none and cannot be evaluated.
    """

    weights: Mapping[str, Weight]
    source: TensorSource | None = None
    extra: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> Weight:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, each tied tensor counted once."""
        return sum(_count(w.expr.shape) for w in self.weights.values() if w.kind == "parameter")

    @cached_property
    def bytes(self) -> int:
        """Bytes of parameters and saved buffers in their storage dtypes."""
        return sum(_count(w.expr.shape) * w.expr.dtype.itemsize for w in self.weights.values() if w.kind != "constant")

    def evaluate(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Compute one weight.

        With `dtype` None the result is what a checkpoint would hold: computed in float32 or wider and rounded once to
        the storage dtype. With float64 nothing is rounded in between, which is what verification compares.
        """
        weight = self.weights[name]
        expr = weight.expr
        if isinstance(expr, Source | Const):
            value = self._read(expr)
        else:
            wide = dtype if dtype == torch.float64 else torch.float32
            value = self._compute(expr, wide)
        stored = value.to(expr.dtype) if dtype != torch.float64 or not expr.dtype.is_floating_point else value
        if (dtype is not None and stored.dtype.is_floating_point and weight.kind != "constant") or (
            dtype == torch.float64 and stored.dtype.is_floating_point
        ):
            stored = stored.to(dtype)
        # Products over another memory layout round otherwise: what runs must be laid out as what is saved and loaded.
        stored = stored.contiguous()
        return stored.to(device) if device is not None else stored

    def _read(self, expr: Source | Const) -> torch.Tensor:
        if isinstance(expr, Const):
            return expr.value
        if self.source is None:
            raise LookupError(f"this program was captured without weights, so {expr.name!r} cannot be read")
        value = self.source.get(expr.name)
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise ArtifactError.of(
                "not_finite",
                f"tensor {expr.name!r} holds {count} NaN or infinite values of {value.numel()}",
                help=("nothing useful can be made from this checkpoint: copy it again or train it further",),
            )
        return value

    def _compute(self, expr: Expr, wide: torch.dtype) -> torch.Tensor:
        if isinstance(expr, Source | Const):
            value = self._read(expr)
            return value.to(wide) if value.dtype.is_floating_point else value
        return expr.compute([self._compute(part, wide) for part in expr.parts()])

    def with_expr(self, name: str, change: Callable[[Expr], Expr]) -> WeightStore:
        """A store in which one weight's expression is changed."""
        weight = self.weights[name]
        return replace(self, weights={**self.weights, name: replace(weight, expr=change(weight.expr))})

    def with_weight(self, weight: Weight) -> WeightStore:
        """A store with one weight added or replaced."""
        return replace(self, weights={**self.weights, weight.name: weight})

    def only(self, names: set[str]) -> WeightStore:
        """A store without the weights that no node reads any more."""
        return replace(self, weights={name: weight for name, weight in self.weights.items() if name in names})


@dataclass(frozen=True)
class MemorySource:
    """Tensors held in memory."""

    tensors: Mapping[str, torch.Tensor]

    def get(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`; raises KeyError when there is none."""
        return self.tensors[name]


def _count(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
