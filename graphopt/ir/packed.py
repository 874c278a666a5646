"""Expressions of weights in few bits: codes, scales and lowest values of a tensor, and the values that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from graphopt.ir.expressions import Expr
from graphopt.ops.quantised import encode, grid, groups, pack, row_bytes


@dataclass(frozen=True, eq=False)
class Packed(Expr):
    """One part of a tensor in `bits`, by groups of `group` values along its last axis (or the one before, `turned`).

    `what` is `codes` (packed, uint8), `scale` or `low`, all with the grouped axis last, or `value`: what they stand for, in
    the tensor's own layout.
    """

    part: Expr
    what: Literal["codes", "scale", "low", "value"]
    bits: int
    group: int
    turned: bool = False

    def parts(self) -> tuple[Expr, ...]:
        """The tensor in full."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        sizes = list(self.part.shape)
        if self.what == "value":
            return tuple(sizes)
        if self.turned:
            sizes[-2:] = sizes[:-3:-1]
        last = row_bytes(sizes[-1], self.bits) if self.what == "codes" else groups(sizes[-1], self.group)
        return (*sizes[:-1], last)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return torch.uint8 if self.what == "codes" else self.part.dtype

    def rows(self, start: int, stop: int) -> Expr | None:
        """The same of fewer rows, which are packed each on its own; matrices that are turned keep theirs together."""
        if self.turned and len(self.part.shape) < 3:
            return None
        part = self.part.rows(start, stop)
        return None if part is None else replace(self, part=part)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Round to the nearest point of each group's grid."""
        values = parts[0].mT.contiguous() if self.turned else parts[0]
        scale, low = grid(values, self.bits, self.group)
        if values.dtype != torch.float64:
            # Codes are nearest on the grid as it is stored, not as it was before its own rounding.
            scale, low = (part.to(self.part.dtype).to(values.dtype) for part in (scale, low))
        if self.what == "scale":
            return scale
        if self.what == "low":
            return low
        codes = encode(values, scale, low, self.bits, self.group)
        if self.what == "codes":
            return pack(codes, self.bits)
        size = values.shape[-1]
        wide = [part.repeat_interleave(self.group, dim=-1)[..., :size] for part in (scale, low)]
        found = wide[1] + wide[0] * codes.to(values.dtype)
        return found.mT.contiguous() if self.turned else found

    def describe(self) -> str:
        """What of what in how many bits."""
        return f"{self.what}({self.part.describe()}, {self.bits} bits by {self.group})"
