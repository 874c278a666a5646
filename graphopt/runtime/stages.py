"""When the nodes of a program with a cache can be computed: at load, at the start of a text, by place, or at each step.

What depends on weights alone is folded at load. What depends on a context (an encoder's text, an image) is computed
once when a text starts: that is how cross-attention caches come about. What depends on positions alone is tabulated for
every place, and a step of ordinary text reads a slice of the table. The rest is the step.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.purity import is_pure

aten = torch.ops.aten


class Stage(IntEnum):
    """The earliest moment at which a node's value is known."""

    LOAD = 0
    START = 1
    PLACE = 2
    STEP = 3


# Ops that are tabulated besides the elementwise ones: layouts, and those that run along another axis than the places.
_LAYOUTS = {aten.unsqueeze, aten.to, aten.transpose, aten.contiguous, aten.clone}
_ALONG = {aten.cat: 1, aten.select: 1, aten.slice: 1, aten.repeat_interleave: 2}
_READERS = {torch.ops.graphopt.rotary}
_OF_A_STEP = ("tokens", "positions", "lengths", "spans")


def stages(program: Program) -> dict[fx.Node, Stage]:
    """The stage of every node of a program with a cache."""
    roles = {spec.name: spec.role for spec in program.entry.inputs}
    found: dict[fx.Node, Stage] = {}
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            role = roles.get(node.meta.get("input", ""))
            found[node] = _of_input(node, role)
        elif node.op == "output":
            found[node] = Stage.STEP
        elif _packet(node) is aten.sym_size and roles.get(node.args[0].meta.get("input", "")) == "cache":
            found[node] = Stage.START if node.args[1] in (0, 2) else Stage.STEP
        elif counts_rows(node, roles):
            found[node] = Stage.START
        else:
            found[node] = max((found[source] for source in node.all_input_nodes), default=Stage.LOAD)
            if not is_pure(node) or (found[node] == Stage.PLACE and not _by_place(node)):
                found[node] = Stage.STEP
    return found


def counts_rows(node: fx.Node, roles: dict[str, str]) -> bool:
    """Whether a node is the number of rows, which holds for a whole text, as a step's input has it."""
    of = node.args[0] if _packet(node) is aten.sym_size else None
    return isinstance(of, fx.Node) and node.args[1] == 0 and roles.get(of.meta.get("input", "")) in _OF_A_STEP


def _of_input(node: fx.Node, role: str | None) -> Stage:
    if "weight" in node.meta:
        return Stage.LOAD
    if role == "positions":
        return Stage.PLACE
    return Stage.START if role in ("values", "pictures") else Stage.STEP


def tables(program: Program, stage: dict[fx.Node, Stage]) -> list[fx.Node]:
    """Nodes to tabulate: computed by place, read by a step that broadcasts them over the batch."""
    found = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder" or stage[node] != Stage.PLACE:
            continue
        readers = [user for user in node.users if stage[user] == Stage.STEP]
        if readers and place_axis(node) is not None and all(_broadcasts(user, node) for user in readers):
            found.append(node)
    return found


def place_axis(node: fx.Node) -> int | None:
    """The axis that counts places in a value `[B, .., S, ..]`; None when it is laid out in another way."""
    shape = node.meta["val"].shape
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    return symbolic[1] if len(symbolic) == 2 and symbolic[0] == 0 else None


def _by_place(node: fx.Node) -> bool:
    if not isinstance(node.meta["val"], torch.Tensor) or place_axis(node) is None:
        return False
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    packet = _packet(node)
    if pointwise or packet in _LAYOUTS:
        return True
    if packet not in _ALONG or len(node.args) <= _ALONG[packet]:
        return False
    first = node.args[0][0] if packet is aten.cat else node.args[0]  # type: ignore[index]
    axis = node.args[_ALONG[packet]] % first.meta["val"].dim()  # type: ignore[operator,union-attr]
    return axis not in (0, place_axis(first))  # type: ignore[arg-type]


def _broadcasts(user: fx.Node, table: fx.Node) -> bool:
    """Whether a reader takes a table of batch one as well."""
    packet = _packet(user)
    if packet in _READERS:
        return user.args[0] is not table
    if packet is torch.ops.graphopt.take_tokens:
        return user.args[0] is table
    return isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)
