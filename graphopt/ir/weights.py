"""Weights as lazy expressions: a pass records what should become of a tensor, and nothing is computed until it is read.

`WeightStore.evaluate` computes one weight at a time and `WeightStore.pieces` some rows of one, so that a model larger
than memory converts; the storage dtype rounds exactly once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from graphopt.diagnostics import ArtifactError
from graphopt.ir.expressions import (
    Affine,
    BlockMap,
    Cat,
    Const,
    Expr,
    Index,
    MatMul,
    Rearrange,
    Rows,
    Source,
    Sum,
    Take,
)

__all__ = [
    "Affine",
    "BlockMap",
    "Cat",
    "Const",
    "Expr",
    "Index",
    "MatMul",
    "MemorySource",
    "Rearrange",
    "RowSource",
    "Rows",
    "Source",
    "Sum",
    "Take",
    "TensorSource",
    "Weight",
    "WeightStore",
    "all_finite",
    "sources",
]


class TensorSource(Protocol):
    """Where original tensors come from: a checkpoint on disk, a module in memory."""

    def get(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`; raises KeyError when there is none."""


class RowSource(TensorSource, Protocol):
    """A source that can read some rows of a tensor without the others."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the tensor called `name`."""


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
        return self._finish(weight, weight.expr, dtype, device)

    def run_dtype(self, name: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The dtype of what `evaluate` computes: constants stay as they are unless `dtype` is float64."""
        return _settled(self.weights[name], dtype)

    def pieces(
        self, name: str, size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Iterator[torch.Tensor]:
        """Compute one weight as `evaluate` does, in blocks of rows of about `size` bytes where its expression allows."""
        weight = self.weights[name]
        expr = weight.expr
        rows = expr.shape[0] if expr.shape else 1
        each = _count(expr.shape[1:]) * max(expr.dtype.itemsize, (dtype or expr.dtype).itemsize)
        step = max(1, size // max(each, 1))
        if step >= rows or not expr.shape or expr.rows(0, step) is None:
            yield self._finish(weight, expr, dtype, device)
            return
        for start in range(0, rows, step):
            part = expr.rows(start, min(start + step, rows))
            assert part is not None
            yield self._finish(weight, part, dtype, device)

    def rows(
        self, name: str, index: list[int], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Some rows of one weight, `index` rising, with the bits that `evaluate` gives them; reads little else."""
        weight = self.weights[name]
        found = []
        start = 0
        for i in range(1, len(index) + 1):
            if i == len(index) or index[i] != index[i - 1] + 1:
                part = weight.expr.rows(index[start], index[i - 1] + 1)
                if part is None:
                    return self.evaluate(name, dtype, device)[torch.tensor(index)]
                found.append(self._finish(weight, part, dtype, device))
                start = i
        return torch.cat(found)

    def _finish(
        self, weight: Weight, expr: Expr, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> torch.Tensor:
        if expr.moves or isinstance(expr, Const):
            value = self._compute(expr, None)
        else:
            value = self._compute(expr, dtype if dtype == torch.float64 else torch.float32)
        stored = value.to(expr.dtype) if dtype != torch.float64 or not expr.dtype.is_floating_point else value
        del value
        stored = stored.to(_settled(weight, dtype))
        # Products over another memory layout round otherwise: what runs must be laid out as what is saved and loaded.
        stored = stored.contiguous()
        return stored.to(device) if device is not None else stored

    def _read(self, expr: Source | Const | Rows) -> torch.Tensor:
        if isinstance(expr, Const):
            return expr.value
        leaf = expr.part if isinstance(expr, Rows) else expr
        if self.source is None:
            raise LookupError(f"this program was captured without weights, so {leaf.name!r} cannot be read")
        if isinstance(expr, Rows):
            read = getattr(self.source, "rows", None)
            value: torch.Tensor = (
                self.source.get(leaf.name)[expr.start : expr.stop]
                if read is None
                else read(leaf.name, expr.start, expr.stop)
            )
        else:
            value = self.source.get(leaf.name)
        if not all_finite(value):
            whole = self.source.get(leaf.name).float() if isinstance(expr, Rows) else value.float()
            count = int((~torch.isfinite(whole)).sum())
            raise ArtifactError.of(
                "not_finite",
                f"tensor {leaf.name!r} holds {count} NaN or infinite values of {whole.numel()}",
                help=("nothing useful can be made from this checkpoint: copy it again or train it further",),
            )
        return value

    def _compute(self, expr: Expr, wide: torch.dtype | None) -> torch.Tensor:
        if isinstance(expr, Source | Const | Rows):
            value = self._read(expr)
            return value.to(wide) if wide is not None and value.dtype.is_floating_point else value
        if expr.moves and wide is not None:
            # Moved as it is stored: the bits are the same, and what is left out is never widened.
            value = self._compute(expr, None)
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


def sources(expr: Expr) -> list[str]:
    """Names of the original tensors that an expression reads, each as often as it reads it."""
    if isinstance(expr, Source):
        return [expr.name]
    return [name for part in ((expr.part,) if isinstance(expr, Rows) else expr.parts()) for name in sources(part)]


def all_finite(value: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity, in one pass and without a copy."""
    if not value.dtype.is_floating_point or value.numel() == 0:
        return not value.dtype.is_complex or bool(torch.isfinite(value).all())
    if value.dtype.itemsize == 1:
        return all(bool(torch.isfinite(part.float()).all()) for part in value.reshape(-1).split(1 << 22))
    # The extremes of a tensor with a NaN are NaN.
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _count(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _settled(weight: Weight, dtype: torch.dtype | None) -> torch.dtype:
    stored = weight.expr.dtype
    if dtype is None or not stored.is_floating_point or (weight.kind == "constant" and dtype != torch.float64):
        return stored
    return dtype
