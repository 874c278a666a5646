"""Sizes and bounds while labels propagate: reshapes that regroup factors, slices, operands of a call."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from graphopt.views.atoms import Atom, Axis, Dyn, find, split_product


def slice_bounds(node: fx.Node, size: int) -> tuple[int, int] | None:
    """Start and end of an `aten.slice` along an axis of `size`, clipped and made positive; None when symbolic."""
    start = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    end = node.args[3] if len(node.args) > 3 and node.args[3] is not None else size
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    start = max(0, min(size, start + size if start < 0 else start))
    end = max(start, min(size, end + size if end < 0 else end))
    return start, end


class Rank:
    """Stands for a tensor where only its rank matters."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def dim(self) -> int:
        return self._rank


def consume(tokens: list[Atom | Dyn], size: Any, where: str) -> Axis | None:
    """Take factors off the front until their product is `size`; splits the last one when it is too large."""
    if size == 1:
        return ()
    taken: list[Atom | Dyn] = []
    have: Any = 1
    while tokens:
        token = tokens[0]
        if isinstance(size, int):
            if isinstance(token, Dyn):
                return None
            root = find(token)
            need = size // have
            if size % have:
                return None
            if root.size > need:
                halves = split_product(root, need, where)
                if halves is None:
                    return None
                tokens[0:1] = halves
                continue
            taken.append(root)
            tokens.pop(0)
            have *= root.size
        else:
            factor = token.expr if isinstance(token, Dyn) else sympy.Integer(find(token).size)
            rest = sympy.simplify(size / (have * factor))
            if (isinstance(token, Dyn) and rest.is_Rational and rest < 1) or (
                isinstance(token, Dyn) and not whole(rest)
            ):
                part = sympy.simplify(have * factor / size)
                if not whole(part):
                    return None
                need = sympy.simplify(size / have)
                tokens[0:1] = [Dyn(need), Atom(int(part)) if part.is_Integer and part != 1 else Dyn(part)]
                continue
            taken.append(token)
            tokens.pop(0)
            have = have * factor
        if sympy.simplify(have - size) == 0:
            return tuple(taken)
    return None


def whole(expr: Any) -> bool:
    """Whether a quotient of sizes is itself a size (no denominator left)."""
    return bool(sympy.fraction(sympy.together(expr))[1] == 1)


def every(axes: Any) -> list[Axis]:
    if not axes:
        return []
    if isinstance(axes[0], list):
        return [axis for group in axes for axis in group]
    return list(axes)


def flatten(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found.extend(flatten(value))
        else:
            found.append(value)
    return found


def op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).replace("aten.", "")
