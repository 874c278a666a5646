"""What each group of a lowered graph is: its ops, its kernel, and what it moves and computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.emit import packet
from graphopt.backends.fuse import Group, transparent
from graphopt.backends.index import product, sizes_of
from graphopt.backends.kernel import Kernel
from graphopt.cost.flops import node_flops


@dataclass(frozen=True)
class GroupReport:
    """One group: `bytes` that its kernel must move and `flops`, in the graph's symbols.

    Inputs and outputs move once each; of a table or a bank that is only gathered from, as many rows as are asked for.
    """

    kernel: Kernel
    ops: tuple[str, ...]
    bytes: sympy.Expr
    flops: sympy.Expr

    @classmethod
    def of(cls, group: Group) -> GroupReport:
        """The report of a group that has a kernel."""
        if group.kernel is None:
            raise AssertionError("a group without a kernel was kept")
        kernel = group.kernel
        inside = set(group.nodes)
        moved = sum((_read(node, inside) for node in kernel.inputs), sympy.Integer(0))
        moved += sum((_bytes(node) for node in kernel.outputs), sympy.Integer(0))
        flops = sum((_flops(node) for node in group.nodes), sympy.Integer(0))
        names = tuple(str(packet(node)).rpartition(".")[2] for node in group.nodes)
        return cls(kernel, names, sympy.expand(moved), sympy.expand(flops))

    @property
    def name(self) -> str:
        """The template and the hash of the source."""
        return f"{self.kernel.template}_{self.kernel.digest}"

    def describe(self) -> dict[str, Any]:
        """Plain data, formulae as text."""
        return {
            "kernel": self.name,
            "ops": list(self.ops),
            "bytes": str(self.bytes),
            "flops": str(self.flops),
        }


@dataclass(frozen=True)
class CallReport:
    """One library call, counted as a group is."""

    name: str
    bytes: sympy.Expr
    flops: sympy.Expr

    @property
    def ops(self) -> tuple[str, ...]:
        """The op itself."""
        return (self.name,)

    @classmethod
    def of(cls, node: fx.Node) -> CallReport:
        """The report of a node that moves memory."""
        tensors = [n for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), torch.Tensor)]
        moved = sum((_bytes(n) if n is node else _read(n, {node}) for n in tensors), sympy.Integer(0))
        name = str(node.target).removesuffix(".default").replace("aten.", "aten::")
        return cls(name, sympy.expand(moved), sympy.expand(_flops(node)))


def library_reports(graph: fx.Graph, taken: Collection[fx.Node]) -> list[CallReport]:
    """The library calls of a graph whose kernels take the nodes `taken`: what is neither a view nor a number."""
    found = []
    for node in graph.nodes:
        if node in taken or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
            continue
        if isinstance(node.meta.get("val"), torch.Tensor) and not (transparent(node) and taken):
            found.append(CallReport.of(node))
    return found


def _read(node: fx.Node, inside: Collection[fx.Node]) -> sympy.Expr:
    """Bytes of a node that nodes `inside` a kernel read."""
    asked = _rows_asked(node, inside)
    whole = _bytes(node)
    if asked is None:
        return whole
    rows = sizes_of(node.meta["val"])[0]
    return whole / rows * sympy.Min(rows, asked)


def _rows_asked(node: fx.Node, inside: Collection[fx.Node]) -> sympy.Expr | None:
    """How many rows are gathered from a node, packed ones too; None where something reads it as a whole."""
    total = sympy.Integer(0)
    readers = [user for user in node.users if user in inside]
    for user in readers:
        if user.target is torch.ops.aten.embedding.default and user.args[0] is node:
            index: Any = user.args[1]
        elif user.target is torch.ops.aten.index.Tensor and user.args[0] is node:
            index = user.args[1][0] if len(user.args[1]) == 1 else None  # type: ignore[index, arg-type]
        elif user.target is torch.ops.graphopt.dequantise.default:
            asked = _rows_asked(user, inside)
            if asked is None:
                return None
            total += asked
            continue
        else:
            return None
        if not isinstance(index, fx.Node) or index.meta["val"].dtype in (torch.bool, torch.uint8):
            return None
        total += product(sizes_of(index.meta["val"]))
    return total if readers else None


def _bytes(node: fx.Node) -> sympy.Expr:
    value = node.meta["val"]
    return sympy.sympify(product(sizes_of(value))) * value.dtype.itemsize


def _flops(node: fx.Node) -> sympy.Expr:
    """Products by the cost model; a pointwise or reduction node counts one a read or written element."""
    counted = node_flops(node)
    if counted is not None and counted != 0:
        return counted
    values = [node.meta["val"]]
    if node.target not in (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor):
        values += [n.meta.get("val") for n in node.all_input_nodes]
    elements = [product(sizes_of(v)) for v in values if isinstance(v, torch.Tensor)]
    return sympy.Max(*elements) if elements else sympy.Integer(0)
