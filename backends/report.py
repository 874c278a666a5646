"""What each group of a lowered graph is: its ops, its kernel, and what it moves and computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.backends.fuse import Group
from graphopt.backends.index import product, sizes_of
from graphopt.backends.kernel import Kernel
from graphopt.cost.flops import node_flops


@dataclass(frozen=True)
class GroupReport:
    """One group: `bytes` that its kernel must move (inputs and outputs, once each) and `flops`, in the graph's symbols."""

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
        moved = sum((_bytes(node) for node in (*kernel.inputs, *kernel.outputs)), sympy.Integer(0))
        flops = sum((_flops(node) for node in group.nodes), sympy.Integer(0))
        names = tuple(str(node.target).removeprefix("aten.").partition(".")[0] for node in group.nodes)
        return cls(kernel, names, sympy.expand(moved), sympy.expand(flops))

    def describe(self) -> dict[str, Any]:
        """Plain data, formulae as text."""
        return {
            "kernel": f"{self.kernel.template}_{self.kernel.digest}",
            "ops": list(self.ops),
            "bytes": str(self.bytes),
            "flops": str(self.flops),
        }


def _bytes(node: fx.Node) -> sympy.Expr:
    value = node.meta["val"]
    return sympy.sympify(product(sizes_of(value))) * value.dtype.itemsize


def _flops(node: fx.Node) -> sympy.Expr:
    """Products by the cost model; a pointwise or reduction node counts one a read or written element."""
    counted = node_flops(node)
    if counted is not None and counted != 0:
        return counted
    values = [node.meta["val"], *(n.meta["val"] for n in node.all_input_nodes)]
    elements = [product(sizes_of(v)) for v in values if isinstance(v, torch.Tensor)]
    return sympy.Max(*elements) if elements else sympy.Integer(0)
