"""Writing values: the Triton text of any node of a group at any coordinates.

Views, slices, concatenations and broadcasts cost nothing here: they only change coordinates. A value is written once for
each set of coordinates that asks for it, in the outermost loop that knows its axes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.backends.index import (
    ZERO,
    Index,
    Size,
    Unfusable,
    add,
    bare,
    both,
    expression,
    linear,
    reshape,
    same,
    text_of,
    times,
)
from graphopt.backends.index import sizes_of as raw_sizes
from graphopt.backends.packed import UNPACKED, unpacked
from graphopt.backends.pointwise import CASTS, HELPERS, TRITON, cast, literal, operand_dtype, rule_of

aten = torch.ops.aten

RESHAPES = (aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten,
            aten.alias, aten.detach)  # fmt: skip
VIEWS = (*RESHAPES, aten.expand, aten.permute, aten.transpose, aten.t, aten.slice, aten.select)
CREATIONS = (aten.full, aten.zeros, aten.ones, aten.full_like, aten.zeros_like, aten.ones_like, aten.scalar_tensor,
             aten.arange)  # fmt: skip
JOINS = (aten.cat, aten.constant_pad_nd)
TAKE = torch.ops.graphopt.take_tokens


def packet(node: Any) -> Any:
    """The overload packet that a node calls, or None."""
    return getattr(node.target, "overloadpacket", None) if isinstance(node, fx.Node) else None


@dataclass(frozen=True)
class Value:
    """A written value: its text, its torch dtype, the axes it varies over; `number` when it is a Python number."""

    text: str
    dtype: torch.dtype
    axes: frozenset[str] = frozenset()
    number: float | int | None = None

    def read(self, dtype: torch.dtype, *, explicit: bool = False) -> str:
        """Its text in another dtype."""
        if self.number is not None:
            return literal(self.number, dtype)
        return cast(self.text, self.dtype, dtype, explicit=explicit)


@dataclass
class Block:
    """Lines of one loop body over `axis` (None: outside of all loops) and the values that it has."""

    axis: str | None = None
    lines: list[str] = field(default_factory=list)
    memo: dict[Any, Value] = field(default_factory=dict)


class Emitter:
    """Writes the values of a group of nodes; what lies outside of the group is loaded.

    `masks` gives for every axis of the tile the text that bounds it.
    """

    loop_of: dict[str, str] = {}  # other forms of a loop's axis: a column of the same positions

    def __init__(self, inside: Collection[fx.Node], masks: dict[str, str]) -> None:
        self.inside = set(inside)
        self.masks = masks
        self.blocks = [Block()]
        self.inputs: dict[fx.Node, str] = {}
        self.strides: list[tuple[str, fx.Node, int]] = []
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.helpers: set[str] = set()
        self.written_inputs: set[fx.Node] = set()
        self.kept_half: set[fx.Node] = set()  # inputs that only products read: widening them would cost registers
        self._names: dict[str, int] = {}

    # Sizes and names

    def size(self, size: Size) -> Size:
        """A size in the kernel's own symbols."""
        if isinstance(size, int):
            return size
        for symbol in sorted(size.free_symbols, key=str):
            if symbol not in self.symbols:
                self.symbols[symbol] = sympy.Symbol(f"n{len(self.symbols)}", positive=True, integer=True)
        return size.xreplace(self.symbols)

    def sizes(self, node: fx.Node) -> list[Size]:
        """A node's shape in the kernel's own symbols."""
        return [self.size(s) for s in raw_sizes(node.meta["val"])]

    def name(self, stem: str) -> str:
        """A fresh name."""
        count = self._names[stem] = self._names.get(stem, -1) + 1
        return f"{stem}_{count}" if count else stem

    def line(self, text: str, stem: str, axes: frozenset[str]) -> str:
        """Assign `text` to a fresh name in the outermost block that knows `axes`."""
        name = self.name(stem)
        self._block(axes).lines.append(f"{name} = {text}")
        return name

    def _block(self, axes: frozenset[str]) -> Block:
        loops = {self.loop_of.get(axis, axis) for axis in axes}
        for block in reversed(self.blocks):
            if block.axis is None or block.axis in loops:
                return block
        return self.blocks[0]

    def _visible(self) -> Iterator[Block]:
        """Blocks whose values may be read here: of several loops over one axis only the innermost."""
        seen: set[str | None] = set()
        for block in reversed(self.blocks):
            if block.axis not in seen:
                seen.add(block.axis)
                yield block

    @contextmanager
    def loop(self, axis: str) -> Iterator[Block]:
        """A block for the body of a loop over `axis`."""
        block = Block(axis)
        self.blocks.append(block)
        yield block
        self.blocks.remove(block)

    # Values

    def value(self, node: Any, indices: Sequence[Index], guard: Index | None = None) -> Value:
        """The value of `node` at `indices`; `guard` is a condition that must hold for its loads to be in bounds."""
        if not isinstance(node, fx.Node):
            dtype = torch.bool if isinstance(node, bool) else torch.int64 if isinstance(node, int) else torch.float32
            return Value(repr(node), dtype, number=node)
        found = node.meta["val"]
        if isinstance(found, torch.SymFloat | float):
            raise Unfusable("a number that is known only when the graph runs")
        if not isinstance(found, torch.Tensor):
            return Value(f"tl.full([1], {text_of(self.size(expression(found)))}, tl.int64)", torch.int64)
        key = (node, tuple(i.text for i in indices), guard.text if guard else "")
        for block in self._visible():
            if key in block.memo:
                return block.memo[key]
        value = self.write(node, list(indices), guard)
        self._block(value.axes).memo[key] = value
        return value

    def remember(self, node: fx.Node, indices: Sequence[Index], value: Value) -> None:
        """Give a node's value at `indices`, written by a template."""
        self.blocks[0].memo[(node, tuple(i.text for i in indices), "")] = value

    def write(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """Write one node; subclasses add reductions and products."""
        kind = packet(node)
        if kind in VIEWS and self.free(node):
            return self.value(node.args[0], self.source(node, indices), guard)
        if kind in CREATIONS:
            return self._create(node, indices)
        if node not in self.inside:
            return self.load(node, indices, guard)
        if kind is aten.cat:
            return self._cat(node, indices, guard)
        if kind is aten.constant_pad_nd:
            return self._pad(node, indices, guard)
        if kind is TAKE:
            return self._take(node, indices, guard)
        if kind in UNPACKED:
            text, axes = unpacked(self, node, indices, guard)
            return Value(self.line(text, "weight", axes), node.meta["val"].dtype, axes)
        if kind in CASTS:
            value = self.operand(node, node.args[0], indices, guard)
            return self._named(value, value.read(node.meta["val"].dtype, explicit=True), node)
        rule = rule_of(node)
        if rule is None:
            raise Unfusable(f"no rule writes {node.target}")
        operands = list(node.args) + [v for k, v in node.kwargs.items() if k == "alpha"]
        values = [self.operand(node, o, indices, guard) for o in operands]
        wanted = [operand_dtype(rule, node, i, operands) for i in range(len(values))]
        texts = [v.read(d) for v, d in zip(values, wanted, strict=True)]
        if values and all(v.number is not None for v in values):
            texts[0] = f"tl.full([1], {texts[0]}, {TRITON[wanted[0]]})"
        if "approximate" in node.kwargs:
            texts.append(node.kwargs["approximate"])
        text = rule.text(*texts) if callable(rule.text) else rule.text.format(*texts)
        if rule.helper and f"{rule.helper}(" in text.replace(f"tl.{rule.helper}(", ""):
            self.helpers.add(rule.helper)
        axes = frozenset().union(*(v.axes for v in values))
        if text in texts:
            return Value(text, node.meta["val"].dtype, axes)
        return Value(self.line(text, self._stem(node), axes), node.meta["val"].dtype, axes)

    def _take(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """Tokens through their index: the index is loaded, and what it says is where the entry lies."""
        x, index, axis = node.args
        rows = self.sizes(index)  # type: ignore[arg-type]
        row = ZERO if same(self.sizes(x)[0], 1) else indices[0]  # type: ignore[arg-type]
        chosen = self.value(
            index, [ZERO if same(s, 1) else indices[i] for s, i in zip(rows, (0, axis), strict=True)], guard
        )  # type: ignore[index]
        moved = [row, *indices[1:]]
        moved[axis] = Index(chosen.text, chosen.axes)  # type: ignore[index]
        return self.value(x, moved, guard)

    def operand(self, node: fx.Node, operand: Any, indices: Sequence[Index], guard: Index | None) -> Value:
        """An operand's value at a node's coordinates, broadcast as torch does."""
        if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], torch.Tensor):
            return self.value(operand, (), guard)
        sizes = self.sizes(operand)
        own = list(indices)[len(indices) - len(sizes) :] if sizes else []
        out = self.sizes(node)[len(indices) - len(sizes) :] if sizes else []
        return self.value(
            operand,
            [ZERO if same(s, 1) and not same(o, 1) else i for i, s, o in zip(own, sizes, out, strict=True)],
            guard,
        )

    def _stem(self, node: fx.Node) -> str:
        stem = str(getattr(packet(node), "__name__", "value")).strip("_")
        return f"{stem}_" if stem in HELPERS else stem

    def _named(self, value: Value, text: str, node: fx.Node) -> Value:
        dtype = node.meta["val"].dtype
        if text == value.text:
            return Value(text, dtype, value.axes)
        return Value(self.line(text, "cast", value.axes), dtype, value.axes)

    # Loads

    def free(self, node: fx.Node) -> bool:
        """Whether a view can be read through: its coordinates are known."""
        return not (packet(node) is aten.slice and _slice_start(node) is None)

    def load(self, node: fx.Node, indices: Sequence[Index], guard: Index | None) -> Value:
        """Load an element of a tensor that lies outside of the group."""
        dtype = node.meta["val"].dtype
        if dtype not in TRITON:
            raise Unfusable(f"{dtype} is not generated")
        if node not in self.inputs:
            self.inputs[node] = f"in{len(self.inputs)}"
        pointer = self.inputs[node]
        offset = self.offset(node, pointer, indices)
        axes = offset.axes | (guard.axes if guard else frozenset())
        for axis in sorted(axes - offset.axes):
            # The condition is a block: so must be the pointer.
            offset = Index(f"{offset.text} + {axis} * 0", axes)
        conditions = [self.masks[a] for a in sorted(axes) if self.masks.get(a)] + ([guard.text] if guard else [])
        mask = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        text = f"tl.load({pointer}{'' if offset.text == '0' else f' + {bare(offset.text)}'}{mask})"
        if dtype in (torch.float16, torch.bfloat16) and node not in self.kept_half:
            text += ".to(tl.float32)"
        return Value(self.line(text, "v", axes), dtype, axes)

    def offset(self, node: fx.Node, pointer: str, indices: Sequence[Index]) -> Index:
        """Where an element lies: by sizes when the tensor is contiguous, else by strides that the launch passes."""
        value = node.meta["val"]
        sizes = self.sizes(node)
        if value.is_contiguous() and node not in self.written_inputs:
            return linear(indices, sizes)
        result = ZERO
        for axis, (index, size) in enumerate(zip(indices, sizes, strict=True)):
            if same(size, 1) or index.text == "0":
                continue
            name = f"{pointer}_stride{axis}"
            if all(name != known for known, _, _ in self.strides):
                self.strides.append((name, node, axis))
            result = add(result, Index(f"{index.text} * {name}", index.axes))
        return result

    # Coordinates through views

    def source(self, node: fx.Node, indices: list[Index]) -> list[Index]:
        """The coordinates in a view's base of its element at `indices`."""
        kind, base = packet(node), node.args[0]
        before, after = self.sizes(base), self.sizes(node)  # type: ignore[arg-type]
        rank = len(before)
        if kind in RESHAPES:
            return reshape(indices, after, before)
        if kind is aten.expand:
            own = indices[len(after) - rank :]
            out = after[len(after) - rank :]
            return [ZERO if same(s, 1) and not same(o, 1) else i for i, s, o in zip(own, before, out, strict=True)]
        if kind is aten.permute or kind in (aten.transpose, aten.t):
            order = list(range(rank))
            if kind is aten.permute:
                order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
            elif rank > 1:
                a, b = (0, 1) if kind is aten.t else (int(node.args[1]) % rank, int(node.args[2]) % rank)  # type: ignore[arg-type]
                order[a], order[b] = order[b], order[a]
            result = [ZERO] * rank
            for position, axis in enumerate(order):
                result[axis] = indices[position]
            return result
        axis = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
        if kind is aten.select:
            where = node.args[2]
            place = expression(where.meta["val"]) if isinstance(where, fx.Node) else where
            if isinstance(place, int) and place < 0:
                place = before[axis] + place
            return [*indices[:axis], Index(text_of(self.size(place))), *indices[axis:]]
        start = _slice_start(node)
        step = node.args[4] if len(node.args) > 4 else 1
        if start is None or not isinstance(step, int):
            raise Unfusable("a slice whose start is not known")
        if isinstance(start, int) and start < 0:
            raise Unfusable("a slice that starts before its tensor")
        moved = add(times(indices[axis], step), Index(text_of(self.size(start))))
        return [*indices[:axis], moved, *indices[axis + 1 :]]

    # Creation and joining

    def _create(self, node: fx.Node, indices: Sequence[Index]) -> Value:
        kind, dtype = packet(node), node.meta["val"].dtype
        if dtype not in TRITON:
            raise Unfusable(f"{dtype} is not generated")
        if kind is aten.arange:
            start, step = 0, 1
            if node.target is not aten.arange.default:
                start = node.args[0]  # type: ignore[assignment]
                step = node.args[2] if len(node.args) > 2 else 1  # type: ignore[assignment]
            if not isinstance(start, int) or not isinstance(step, int):
                raise Unfusable("arange that does not count in known steps")
            index = add(times(indices[0], step), Index(str(start)))
            if index.constant is not None:
                return Value(index.text, dtype, number=index.constant)
            return Value(self.line(f"({bare(index.text)}).to({TRITON[dtype]})", "count", index.axes), dtype, index.axes)
        constants = {aten.zeros: 0, aten.zeros_like: 0, aten.ones: 1, aten.ones_like: 1}
        number = constants.get(kind)
        if number is None:
            number = node.args[0] if kind is aten.scalar_tensor else node.args[1]  # type: ignore[assignment]
        if isinstance(number, fx.Node):
            return self.value(number, ())
        return Value(literal(number, dtype), dtype, number=number)

    def _cat(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        pieces = [p for p in node.args[0] if len(p.meta["val"].shape) == len(indices)]  # type: ignore[union-attr]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axis = int(dim) % len(indices)  # type: ignore[arg-type]
        index, dtype = indices[axis], node.meta["val"].dtype
        start: Size = 0
        parts: list[tuple[str, Value]] = []
        for number, piece in enumerate(pieces):
            end = start + self.sizes(piece)[axis]
            low = [] if number == 0 else [f"({index.text} >= {text_of(start)})"]
            high = [] if number == len(pieces) - 1 else [f"({index.text} < {text_of(end)})"]
            condition = Index(" & ".join([*low, *high]), index.axes)
            inner = both(guard, condition)
            moved = index if number == 0 else Index(f"({index.text} - {text_of(start)})", index.axes)
            value = self.value(piece, [*indices[:axis], moved, *indices[axis + 1 :]], inner)
            parts.append((high[0] if high else "", value))
            start = end
        axes = index.axes.union(*(value.axes for _, value in parts))
        text = parts[-1][1].read(dtype)
        for condition_text, value in reversed(parts[:-1]):
            text = f"tl.where({condition_text}, {value.read(dtype)}, {text})"
        return Value(self.line(text, "joined", axes), dtype, axes)

    def _pad(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        source, pad = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        fill = node.args[2] if len(node.args) > 2 else 0
        sizes, rank, dtype = self.sizes(source), len(indices), node.meta["val"].dtype  # type: ignore[arg-type]
        condition: Index | None = None
        moved = list(indices)
        for position in range(len(pad) // 2):
            axis, before, after = rank - 1 - position, pad[2 * position], pad[2 * position + 1]
            if not isinstance(before, int) or not isinstance(after, int):
                raise Unfusable("padding of unknown width")
            index = indices[axis]
            if before:
                moved[axis] = Index(f"({index.text} - {before})", index.axes)
                condition = both(condition, Index(f"({index.text} >= {before})", index.axes))
            if after:
                condition = both(condition, Index(f"({index.text} < {text_of(sizes[axis] + before)})", index.axes))
        value = self.value(source, moved, both(guard, condition) if condition else guard)
        if condition is None:
            return value
        axes = value.axes | condition.axes
        text = f"tl.where({condition.text}, {value.read(dtype)}, {literal(fill, dtype)})"
        return Value(self.line(text, "padded", axes), dtype, axes)

    def helper_sources(self) -> list[str]:
        """Functions that the written text calls."""
        return [HELPERS[name] for name in sorted(self.helpers)]


def _slice_start(node: fx.Node) -> Size | None:
    start = node.args[2] if len(node.args) > 2 else 0
    size = raw_sizes(node.args[0].meta["val"])[int(node.args[1] if len(node.args) > 1 else 0)]  # type: ignore[union-attr, arg-type]
    if isinstance(start, fx.Node):
        start = expression(start.meta["val"])
    if start is None:
        return 0
    if isinstance(start, int):
        if start >= 0:
            return min(start, size) if isinstance(size, int) else start
        return max(start + size, 0) if isinstance(size, int) else None
    return start if isinstance(start, sympy.Expr) and bool(start.is_nonnegative) else None
