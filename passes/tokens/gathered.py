"""The fast meaning: tokens that stay are gathered, and everything behind a stage is as long as they are many."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.ir.follow import rank
from graphopt.passes.tokens.stage import Stage
from graphopt.passes.tokens.walk import Walk

aten = torch.ops.aten
ops = torch.ops.graphopt


class Gathered(Walk):
    """At each level an index `[B, L]` into the original tokens, which of its places hold one, and L."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.index: dict[int, fx.Node] = {}
        self.real: dict[int, fx.Node] = {}
        self.lengths: dict[int, Any] = {}
        self.places: dict[int, fx.Node] = {}
        self.present: dict[int, fx.Node] = {}

    def stage(self, stage: Stage, point: fx.Node) -> fx.Node:
        """Score, choose, and take."""
        x, level = self.reads(point), self.count
        base = self.base(point)
        if level:
            inside = self.call(ops.take_tokens.default, base["span"], self.index[level], 1)
            span, real = self._and(inside, self.real[level]), self.real[level]
        else:
            span, real = base["span"], base["real"]
        keep, x = self.choose(stage, x, span, real)
        length = self._length(stage, point)
        everywhere = self.selection.past == "drop" and stage is self.stages[-1]
        index = self.call(ops.token_index.default, keep, length, *((True,) if everywhere else ()))
        taken = self.call(ops.take_tokens.default, x, index, 1)
        new = level + 1
        self.real[new] = self.call(ops.take_tokens.default, keep, index, 1)
        self.index[new] = self.call(ops.take_tokens.default, self.index[level], index, 1) if level else index
        self.lengths[new] = length
        if self.selection.positions == "renumber":
            self.places[new] = self._renumbered(length)
        if self.presence is not None:
            present = self.call(ops.take_tokens.default, self.presence, index, 1)
            if level in self.present:
                before = self.call(ops.take_tokens.default, self.present[level], index, 1)
                present = self.call(aten.mul.Tensor, present, before)
            self.present[new] = present
        return taken

    def given(self, values: fx.Node, level: int) -> fx.Node:
        """Their values, by which scores learn how they are missed."""
        if level not in self.present:
            return values
        wide = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, self.present[level], 1), 3)
        return self.call(aten.mul.Tensor, values, wide)

    def _renumbered(self, length: Any) -> fx.Node:
        """The original places `[B, L]` whose positions the tokens take: the first real one and those behind it."""
        first = self.call(aten.argmax.default, self.call(aten.to.dtype, self._base["real"], torch.int64), 1, True)
        steps = self.call(aten.arange.default, length, dtype=torch.int64, device=torch.device("cpu"), pin_memory=False)
        last = self.call(aten.sub.Tensor, self.call(aten.sum.dim_IntList, self._base["real"], [1], True), 1)
        last = self.call(aten.add.Tensor, first, last)
        return self.call(aten.minimum.default, self.call(aten.add.Tensor, first, steps), last)

    def _length(self, stage: Stage, point: fx.Node) -> Any:
        """How many places there are behind a stage: all tokens but those of the span that every row loses."""
        span, (over, under) = self.span, stage.share
        if span.tokens is None:
            return span.total - span.count + span.stay(stage.share)
        tokens = self.rewriter.input_node(span.tokens.name)
        whole = self._number("tokens", aten.sym_size.int, tokens, 1)
        if span.splice is not None:
            pictures = self.rewriter.input_node(span.splice.pictures.name)
            rows = self._number("rows", aten.sym_size.int, tokens, 0)
            count = self._number("pictures", aten.sym_size.int, pictures, 0)
            each = self._number("each", operator.floordiv, count, rows)
            inside = self._number("inside", operator.mul, each, span.splice.entries)
        else:
            rest = self._number("rest", operator.sub, whole, span.first + span.last)
            inside = self._number("inside", torch.sym_max, rest, 0)
        stay = self.call(operator.floordiv, self.call(operator.mul, inside, over), under)
        length = self.call(operator.sub, whole, self.call(operator.sub, inside, stay))
        return self.call(torch.sym_min, length, self.call(aten.sym_size.int, point, 1)) if self.chain else length

    def _number(self, name: str, target: Any, *args: Any) -> fx.Node:
        key = f"number:{name}"
        if key not in self._base:
            self._base[key] = self.call(target, *args)
        return self._base[key]

    def length(self, level: int) -> Any:
        """L."""
        return self.lengths[level]

    def side(self, operand: fx.Node, axis: int, level: int, count: int) -> fx.Node:
        """Gathered as the tokens are; with new positions, what belongs to places is that of the new ones."""
        moved = self.selection.positions == "renumber" and self.positional(operand)
        index = self.places[level] if moved else self.index[level]
        key = (operand, axis, level, count)
        if key not in self._sides:
            wide, at = self.leading(operand, axis, count)
            self._sides[key] = self.call(ops.take_tokens.default, wide, index, at)
        return self._sides[key]

    def whole(self, node: fx.Node, axis: int, level: int) -> fx.Node:
        """Put back, zero elsewhere."""
        return self.call(ops.put_tokens.default, node, self.index[level], self.real[level], self._base["real"], axis)

    def stays(self, level: int) -> fx.Node:
        """Put back."""
        return self.whole(self.real[level], 1, level)

    def mean(self, node: fx.Node, level: int) -> fx.Node | None:
        """The mean over what is there."""
        return None

    def at_level(self, node: fx.Node) -> fx.Node:
        """Gathered."""
        return self.call(ops.take_tokens.default, node, self.index[self.count], 1) if self.count else node

    def last_place(self) -> fx.Node:
        """Behind all that stays."""
        if not self.count:
            return self.call(aten.argmax.default, self.call(aten.to.dtype, self._base["last"], torch.int64), 1, True)
        held = self.call(aten.sum.dim_IntList, self.real[self.count], [1], True)
        return self.call(aten.clamp.default, self.call(aten.sub.Tensor, held, 1), 0)

    def sees(self, node: fx.Node, mask: Any, level: int, rows: bool, columns: bool) -> tuple[Any, int | None]:
        """Masks are gathered, fillers hidden, and windows measured by original places unless these are numbered anew."""
        causal, window = bool(node.args[6]), node.args[7]
        real, original = self.real[level], mask
        if isinstance(mask, fx.Node) and rank(mask) == 2:
            if columns:
                seen = self.call(aten.to.dtype, mask, torch.bool)
                mask = self._and(self.call(ops.take_tokens.default, seen, self.index[level], 1), real)
        elif isinstance(mask, fx.Node):
            sizes = mask.meta["val"].shape
            if rows and sizes[2] != 1:
                mask = self.call(ops.take_tokens.default, mask, self.index[level], 2)
            if columns and sizes[3] != 1:
                mask = self.call(ops.take_tokens.default, mask, self.index[level], 3)
            if columns and self.span.ragged:
                mask = self.hiding(mask, original.meta["val"].dtype, real)
        elif columns and self.span.ragged and not causal:
            mask = real
        if window is None or not (rows and columns) or self.selection.positions == "renumber":
            return mask, window  # type: ignore[return-value]
        near = self._near(level, int(window), causal)  # type: ignore[arg-type]
        if mask is None:
            return near, None
        if isinstance(original, fx.Node) and rank(original) == 4:
            return self.joined(mask, original.meta["val"].dtype, near), None
        return self.hiding(near, torch.bool, mask), None

    def _near(self, level: int, window: int, causal: bool) -> fx.Node:
        """Which tokens lie within a window of each other, by their original places, `[B, 1, L, L]`."""
        row = self.call(aten.unsqueeze.default, self.index[level], 2)
        column = self.call(aten.unsqueeze.default, self.index[level], 1)
        behind = self.call(aten.sub.Tensor, row, column)
        near = self.call(aten.lt.Scalar, behind, window)
        if not causal:
            near = self._and(near, self.call(aten.gt.Scalar, behind, -window))
        return self.call(aten.unsqueeze.default, near, 1)
