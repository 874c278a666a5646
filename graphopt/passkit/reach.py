"""Parameters that nodes depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.reach import ancestors


def parameters_of(program: Program, nodes: Iterable[fx.Node]) -> list[str]:
    """Names of the floating parameters that nodes depend on, in the order of the graph."""
    read = ancestors(nodes)
    names = [node.meta["weight"] for node in program.graph.graph.nodes if node in read and "weight" in node.meta]
    weights = program.weights
    return [n for n in names if weights[n].kind == "parameter" and weights[n].expr.dtype.is_floating_point]
