"""What the rules of the front end match nodes with."""

from __future__ import annotations

from typing import Any

from torch import fx


def is_op(node: Any, *targets: Any) -> bool:
    """Whether `node` is a call of one of `targets`; an overload packet stands for all its overloads."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return any(target is wanted or packet is wanted for wanted in targets)


def through(node: Any, *targets: Any) -> Any:
    """The first node behind calls of `targets`, along their first arguments."""
    while is_op(node, *targets):
        node = node.args[0]
    return node
