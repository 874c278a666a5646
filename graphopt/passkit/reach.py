"""What nodes depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from graphopt.ir.program import Program


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The given nodes and all that they depend on."""
    stack = list(nodes)
    seen = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def parameters_of(program: Program, nodes: Iterable[fx.Node]) -> list[str]:
    """Names of the floating parameters that nodes depend on, in the order of the graph."""
    read = ancestors(nodes)
    names = [node.meta["weight"] for node in program.graph.graph.nodes if node in read and "weight" in node.meta]
    weights = program.weights
    return [n for n in names if weights[n].kind == "parameter" and weights[n].expr.dtype.is_floating_point]
