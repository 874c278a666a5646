"""Our own purity rule: which nodes may be removed when nothing reads them.

FX counts scaled-dot-product attention as impure (it may draw random numbers), so its dead-code elimination keeps
attention that a pass has skipped; and it deletes nothing that writes through `out=`. We decide by the op's schema.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

_PYTHON_OPERATORS = {getattr(operator, name) for name in dir(operator) if not name.startswith("_")}


def is_pure(node: fx.Node) -> bool:
    """Whether removing `node` when it has no users keeps the program's results."""
    if node.op in ("placeholder", "output"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        if schema.is_mutable:
            return False
        return "_assert" not in schema.name
    if target in _PYTHON_OPERATORS:
        return True
    module = getattr(target, "__module__", "") or ""
    return module.startswith(("math", "torch", "graphopt.ir.grouped", "graphopt.ir.by_expert")) or getattr(
        target, "__name__", ""
    ).startswith("sym_")


def eliminate_dead_code(graph: fx.Graph, also: Callable[[fx.Node], bool] = lambda node: False) -> int:
    """Remove unread pure nodes; returns how many went. Weight placeholders are removed too, inputs never.

    `also` names further nodes that may go when nothing reads them.
    """
    removed = 0
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        if is_pure(node) or (node.op == "placeholder" and "weight" in node.meta) or also(node):
            graph.erase_node(node)
            removed += 1
    return removed
