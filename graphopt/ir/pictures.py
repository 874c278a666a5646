"""Pictures among tokens: where a graph writes what it made of pictures into the embedding of its tokens.

A placeholder token stands in the text for each entry that a picture gives; the graph compares the tokens with its id and
scatters the entries there, in order. This module finds that place and lets the number of pictures vary.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.follow import At, Lost, follow, given, packet, rank, sizes_of
from graphopt.ir.program import Dim, Input, Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.rewriter import Rewriter

aten = torch.ops.aten
PICTURES = Dim("I", 1, 1 << 16, 2)
_MASK_LAYOUTS = {aten.unsqueeze, aten.expand, aten.expand_as, aten.to, aten._to_copy, aten.contiguous, aten.clone}


@dataclass(frozen=True, eq=False)
class Splice:
    """One place where entries of pictures enter a text: `node` scatters `source` where `tokens` equal `token`.

    `pictures` is the input that they come from, and `entries` how many entries a picture gives.
    """

    node: fx.Node
    tokens: Input
    token: int
    mask: fx.Node
    source: fx.Node
    pictures: Input
    entries: int


def splices(program: Program) -> tuple[Splice, ...]:
    """Every place where entries of pictures enter the embedding of the tokens, in graph order."""
    inputs = {spec.name: spec for spec in program.entry.inputs}
    found = []
    for node in program.graph.graph.nodes:
        if packet(node) is not aten.masked_scatter:
            continue
        mask, source = node.args[1:]
        compared = mask
        while packet(compared) in _MASK_LAYOUTS:
            compared = compared.args[0]
        if packet(compared) is not aten.eq or not isinstance(compared.args[1], int):
            continue
        tokens = inputs.get(compared.args[0].meta.get("input", ""))
        pictures = _pictures(program, source)
        if tokens is None or tokens.role != "tokens" or pictures is None:
            continue
        placeholder = next(n for n in program.graph.graph.nodes if n.meta.get("input") == pictures.name)
        made, each = sizes_of(source.meta["val"]), sizes_of(placeholder.meta["val"])[0]
        count = 1
        for size in made[:-1]:
            count *= size
        if each and count % each == 0:
            found.append(Splice(node, tokens, compared.args[1], compared, source, pictures, count // each))
    return tuple(found)


def _pictures(program: Program, source: fx.Node) -> Input | None:
    """The one input of pictures whose values reach a node."""
    roles = {spec.name: spec for spec in program.entry.inputs if spec.role == "pictures"}
    stack, seen, found = [source], {source}, set()
    while stack:
        node = stack.pop()
        if node.meta.get("input") in roles:
            found.add(node.meta["input"])
        for other in node.all_input_nodes:
            if other not in seen and packet(node) is not aten.sym_size:
                seen.add(other)
                stack.append(other)
    return roles[found.pop()] if len(found) == 1 else None


def let_vary(program: Program, name: str) -> Program:
    """The program for any number of pictures: `name` is the input whose first axis was captured with a fixed one.

    Raises Lost where the number of pictures cannot be followed through the graph.
    """
    spec = next(spec for spec in program.entry.inputs if spec.name == name)
    count = spec.shape[0]
    if not isinstance(count, int) or count == PICTURES.hint:
        raise ValueError(f"{name} must have a fixed number of pictures other than {PICTURES.hint}")
    rewriter = Rewriter(program)
    _join_pieces(rewriter)
    start = rewriter.input_node(name)
    nodes = list(rewriter.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    length = rewriter.call(aten.sym_size.int, start, 0, after=inputs[-1])
    known: dict[fx.Node, At | None] = {start: At(0)}
    for node in nodes:
        if node.op != "call_function" or not any(known.get(source) for source in node.all_input_nodes):
            continue
        step = follow(node, known)
        known[node] = step.at
        for operand, axis in step.meets:
            _fit(node, operand, axis, length)
        if step.event == "size":
            node.replace_all_uses_with(length)
        elif step.event not in (None, "splice"):
            raise Lost(node, "runs over pictures")
        if step.sizes is not None:
            node.args = _spelled(node, step.sizes(length))
    shape = (PICTURES.name, *spec.shape[1:])
    rewriter.add_dim(PICTURES)
    return rewriter.finish(
        tuple(replace(each, shape=shape) if each.name == name else each for each in program.entry.inputs)
    )


def _spelled(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a view without a size left open, which no pictures at all would leave undetermined."""
    if packet(node) not in (aten.view, aten.reshape, aten._unsafe_view):
        return args
    sizes = list(args[1])
    for axis, size in enumerate(sizes):
        found = node.meta["val"].shape[axis]
        if size == -1 and isinstance(found, int) and any(isinstance(other, fx.Node) for other in sizes):
            sizes[axis] = found
    return (args[0], sizes, *args[2:])


def _join_pieces(rewriter: Rewriter) -> None:
    """Taking all entries of an axis apart and joining them again is a reshape, for any number of entries."""
    for node in list(rewriter.graph.nodes):
        if packet(node) is not aten.cat or given(node, "dim", 0) != 0:
            continue
        pieces = list(node.args[0])
        first = pieces[0].args[0] if pieces and pieces[0].target is operator.getitem else None
        if not isinstance(first, fx.Node) or packet(first) is not aten.unbind or given(first, "dim", 0) != 0:
            continue
        whole = [(piece.target, piece.args) for piece in pieces] == [
            (operator.getitem, (first, i)) for i in range(len(first.meta["val"]))
        ]
        source = first.args[0]
        if whole and rank(source) >= 2:
            joined = rewriter.call(aten.flatten.using_ints, source, 0, 1, before=node)
            joined.meta["val"] = node.meta["val"]
            rewriter.replace(node, joined)
    eliminate_dead_code(rewriter.graph)


def _fit(node: fx.Node, operand: fx.Node, axis: int, length: fx.Node) -> None:
    """Let something that is repeated for every picture be repeated as often as there are pictures."""
    if packet(operand) is not aten.expand or _size(operand.args[0], axis - rank(operand)) != 1:
        raise Lost(node, f"meets %{operand.name}, which is made for a fixed number of pictures")
    sizes = list(operand.args[1])  # type: ignore[arg-type]
    sizes[axis] = length
    operand.args = (operand.args[0], sizes, *operand.args[2:])


def _size(node: Any, axis: int) -> int:
    """The size of an axis counted from the right; 1 where there is none."""
    shape = node.meta["val"].shape
    return shape[axis] if -axis <= len(shape) else 1
