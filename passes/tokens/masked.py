"""The plain meaning: all tokens go on, nobody sees those that have left, and their results are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.follow import given, rank
from graphopt.passes.tokens.stage import Stage
from graphopt.passes.tokens.walk import Walk

aten = torch.ops.aten
ops = torch.ops.graphopt


class Masked(Walk):
    """At each level a mask `[B, S]` of the tokens that are still there."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: dict[int, fx.Node] = {}
        self.ranks: dict[int, fx.Node] = {}

    def stage(self, stage: Stage, point: fx.Node) -> fx.Node:
        """Score and choose among those that are still there."""
        x, level = self.reads(point), self.count
        base = self.base(point)
        real = self.kept[level] if level else base["real"]
        span = self._and(base["span"], real) if level else base["span"]
        keep, x = self.choose(stage, x, span, real)
        self.kept[level + 1] = keep
        if self.selection.positions == "renumber":
            behind = self.call(aten.sub.Tensor, self.call(aten.cumsum.default, keep, 1), 1)
            first = self.call(aten.argmax.default, self.call(aten.to.dtype, base["real"], torch.int64), 1, True)
            self.ranks[level + 1] = self.call(aten.clamp.default, self.call(aten.add.Tensor, behind, first), 0)
        return x

    def length(self, level: int) -> Any:
        """Sizes stay."""
        return None

    def side(self, operand: fx.Node, axis: int, level: int, count: int) -> fx.Node:
        """As it is; with new positions, what belongs to places is that of the new ones."""
        if self.selection.positions == "keep" or not self.positional(operand):
            return operand
        key = (operand, axis, level, count)
        if key not in self._sides:
            wide, at = self.leading(operand, axis, count)
            self._sides[key] = self.call(ops.take_tokens.default, wide, self.ranks[level], at)
        return self._sides[key]

    def whole(self, node: fx.Node, axis: int, level: int) -> fx.Node:
        """Zero for the tokens that have left."""
        value = self._value(node)
        seen = self.kept[level]
        for _ in range(axis - 1):
            seen = self.call(aten.unsqueeze.default, seen, 1)
        for _ in range(value.dim() - axis - 1):
            seen = self.call(aten.unsqueeze.default, seen, -1)
        hidden = self.call(aten.logical_not.default, seen)
        return self.call(aten.masked_fill.Scalar, node, hidden, 0)

    def _value(self, node: fx.Node) -> torch.Tensor:
        original = next((old for old, new in self.now.items() if new is node), node)
        found: torch.Tensor = original.meta["val"]
        return found

    def stays(self, level: int) -> fx.Node:
        """The mask itself."""
        return self.kept[level]

    def mean(self, node: fx.Node, level: int) -> fx.Node | None:
        """The mean over those that are still there."""
        self.last = node
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        original = next((old for old, new in self.now.items() if new is source), source)
        at = self.known[original]
        assert at is not None
        zeroed = self.whole(source, at.axis, level)
        total = self.call(aten.sum.dim_IntList, zeroed, given(node, "dim"), given(node, "keepdim", False))
        count = self.span.total - self.span.count + self.span.stay(self.stages[level - 1].share)
        return self.call(aten.div.Tensor, total, count)

    def at_level(self, node: fx.Node) -> fx.Node:
        """As they are."""
        return node

    def last_place(self) -> fx.Node:
        """The last one never leaves."""
        return self.call(aten.argmax.default, self.call(aten.to.dtype, self._base["last"], torch.int64), 1, True)

    def sees(self, node: fx.Node, mask: Any, level: int, rows: bool, columns: bool) -> tuple[Any, int | None]:
        """Keys that have left are hidden."""
        kept, window = self.kept[level], node.args[7]
        if columns:
            if mask is None:
                mask = kept
            elif rank(mask) == 2:
                mask = self._and(self.call(aten.to.dtype, mask, torch.bool), kept)
            else:
                mask = self.hiding(mask, mask.meta["val"].dtype, kept)
        return mask, window  # type: ignore[return-value]
