"""Whether two programs compute the same function of their weights: a bisimulation from the outputs backwards.

Weights bind by position in the graph, never by name. Shapes and numbers that differ are collected, not fatal, because
they say what a config has to change; another op is fatal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.weights import Const

aten = torch.ops.aten
# The result of these depends on the input and the shape of the result alone; -1 and literal sizes say the same.
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Difference:
    """One thing that keeps two programs apart; `kind` is `shape`, `bias`, `number`, `binding`, `constant` or `op`.

    `name` is a stock weight or an argument; `ours` and `theirs` are the two values.
    """

    kind: str
    text: str
    name: str = ""
    ours: Any = None
    theirs: Any = None


@dataclass
class Match:
    """Stock weight name to program weight name (None: zeros of the stock shape), and what differs."""

    binding: dict[str, str | None] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    attentions: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        """Whether the stock program with the bound weights is the program."""
        return not self.differences


def match(program: Program, stock: Program) -> Match:
    """Compare `program` with `stock` and bind the weights of `stock`; stops at the first op that differs."""
    return _Matcher(program, stock).run()


class _Matcher:
    def __init__(self, program: Program, stock: Program) -> None:
        self.ours, self.theirs = program, stock
        self.result = Match()
        self.symbols = (_symbols(program), _symbols(stock))
        self.seen: set[tuple[fx.Node, fx.Node]] = set()
        self.stack: list[tuple[fx.Node, fx.Node]] = []

    def run(self) -> Match:
        ours, theirs = self.ours, self.theirs
        if ours.entry.outputs != theirs.entry.outputs:
            self.differ("op", f"it returns {', '.join(ours.entry.outputs)}, stock {', '.join(theirs.entry.outputs)}")
            return self.result
        self.stack = list(zip(ours.output_nodes, theirs.output_nodes, strict=True))
        while self.stack:
            pair = self.stack.pop()
            if pair not in self.seen:
                self.seen.add(pair)
                if not self.nodes(*pair):
                    break
        else:
            self.unread()
        self.result.attentions.reverse()
        return self.result

    def differ(self, kind: str, text: str, name: str = "", ours: Any = None, theirs: Any = None) -> None:
        self.result.differences.append(Difference(kind, text, name, ours, theirs))

    def nodes(self, a: fx.Node, b: fx.Node) -> bool:
        """Compare two nodes and push their arguments; False when the ops differ."""
        if "weight" in b.meta:
            return self.weight(a, b)
        size_a, size_b = a.meta.get("val"), b.meta.get("val")
        if isinstance(size_a, torch.SymInt) and isinstance(size_b, torch.SymInt):
            if self.size(size_a, 0) != self.size(size_b, 1):
                self.differ("number", f"{_where(a)} is {size_a}, stock {size_b}", "size")
            return True
        if "input" in b.meta or "input" in a.meta:
            return self.input(a, b)
        if a.target is not b.target and not (a.target in _RESHAPES and b.target in _RESHAPES):
            self.differ("op", f"{_where(a)} is {_op(a)}, a stock model has {_op(b)} there")
            return False
        if b.target in _RESHAPES:
            self.reshape(a, b)
            return True
        if b.target is torch.ops.graphopt.attention.default:
            self.result.attentions.append((a, b))
        mine, other = _arguments(a), _arguments(b)
        for name in {**mine, **other}:
            self.value(a, b, name, mine.get(name), other.get(name))
        return True

    def value(self, a: fx.Node, b: fx.Node, name: str, x: Any, y: Any) -> None:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            self.stack.append((x, y))
        elif isinstance(x, tuple | list) and isinstance(y, tuple | list) and len(x) == len(y):
            for item_x, item_y in zip(x, y, strict=True):
                self.value(a, b, name, item_x, item_y)
        elif x is None and isinstance(y, fx.Node) and name == "bias" and "weight" in y.meta:
            self.bind(y.meta["weight"], None, a)
        elif y is None and isinstance(x, fx.Node) and name == "bias":
            self.differ("bias", f"{_where(a)} has a bias, the stock layer {_where(b)} has none", name)
        elif isinstance(x, fx.Node) or isinstance(y, fx.Node) or x != y or type(x) is not type(y):
            self.differ("number", f"{_where(a)}: {_op(a)} has {name} = {x}, stock has {y}", name, x, y)

    def weight(self, a: fx.Node, b: fx.Node) -> bool:
        stock = self.theirs.weights[b.meta["weight"]]
        if "weight" not in a.meta:
            self.differ("op", f"{_where(a)} computes what stock reads from weight {stock.name!r}")
            return True
        mine = self.ours.weights[a.meta["weight"]]
        if (mine.kind == "constant") != (stock.kind == "constant"):
            self.differ("constant", f"{mine.name!r} is a {mine.kind}, stock {stock.name!r} is a {stock.kind}")
        elif isinstance(stock.expr, Const):
            value = self.ours.weights.evaluate(mine.name)
            if value.dtype != stock.expr.dtype or not torch.equal(value, stock.expr.value):
                self.differ("constant", f"constant {mine.name!r} differs from the stock one", stock.name)
        else:
            if mine.expr.shape != stock.expr.shape:
                shapes = f"{list(mine.expr.shape)}, stock {stock.name!r} {list(stock.expr.shape)}"
                self.differ("shape", f"{mine.name!r} is {shapes}", stock.name, mine.expr.shape, stock.expr.shape)
            if mine.expr.dtype != stock.expr.dtype:
                self.differ("dtype", f"{mine.name!r} is {mine.expr.dtype}, stock {stock.expr.dtype}", stock.name)
            self.bind(stock.name, mine.name, a)
        return True

    def bind(self, stock: str, mine: str | None, at: fx.Node) -> None:
        if self.result.binding.setdefault(stock, mine) != mine:
            first = self.result.binding[stock]
            self.differ("binding", f"stock reads {stock!r} where the program reads {first!r} and {mine!r}", stock)

    def input(self, a: fx.Node, b: fx.Node) -> bool:
        mine = next((spec for spec in self.ours.entry.inputs if spec.name == a.meta.get("input")), None)
        other = next((spec for spec in self.theirs.entry.inputs if spec.name == b.meta.get("input")), None)
        same = mine is not None and other is not None and mine.role == other.role and mine.dtype == other.dtype
        if not same or (mine and other and mine.role == "values" and mine.name != other.name):
            self.differ("op", f"{_where(a)} is not the input {b.meta.get('input')!r} that stock reads there")
            return False
        return True

    def reshape(self, a: fx.Node, b: fx.Node) -> None:
        # The sizes that both spell out are compared through the shape of the result.
        shape_a = [self.size(s, 0) for s in a.meta["val"].shape]
        shape_b = [self.size(s, 1) for s in b.meta["val"].shape]
        if shape_a != shape_b:
            self.differ("number", f"{_where(a)}: a view is {shape_a}, stock {shape_b}", "shape", shape_a, shape_b)
        self.stack.append((a.args[0], b.args[0]))

    def size(self, size: Any, side: int) -> str:
        names = self.symbols[side]
        return re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), str(size))

    def unread(self) -> None:
        for name, weight in self.theirs.weights.weights.items():
            if weight.kind != "constant" and name not in self.result.binding:
                self.differ("binding", f"stock holds {name!r}, which the program does not read", name)


def _symbols(program: Program) -> Mapping[str, str]:
    specs = {spec.name: spec for spec in program.entry.inputs}
    found = {}
    for node in program.graph.graph.nodes:
        if "input" in node.meta:
            for size, name in zip(node.meta["val"].shape, specs[node.meta["input"]].shape, strict=True):
                found[str(size)] = str(name)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, with the defaults of the op filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    found = defaults | given | dict(node.kwargs)
    if node.target is aten.slice.Tensor:
        # To the end or to more than there is.
        size = found["self"].meta["val"].shape[found["dim"]]
        if found["end"] is None or (isinstance(size, int) and isinstance(found["end"], int) and found["end"] >= size):
            found["end"] = sys.maxsize
    return found


def _op(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.name


def _where(node: fx.Node) -> str:
    return str(node.meta.get("path") or node.meta.get("weight") or node.name)
