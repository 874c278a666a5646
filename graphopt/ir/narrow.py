"""A program for a run in a narrower dtype than it was captured in.

Captured in bfloat16, a model says itself what it computes in float32: positions, rotary angles, masks. Captured in
float32 it says nothing, as these casts change nothing there. Positions above 256 have no bfloat16 of their own, so that
such a program must be told.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program

aten = torch.ops.aten


def narrowed(program: Program, target: torch.dtype) -> Program:
    """The program in `target`; itself unless `target` is a narrower floating dtype than its own.

    What depends on integers and constant tables alone keeps its dtype, and is cast where it meets the model's values.
    Nodes keep their names.
    """
    if target.itemsize >= program.dtype.itemsize:
        return program
    exact = _exact(program)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    casts: dict[fx.Node, fx.Node] = {}

    def met(node: fx.Node) -> fx.Node:
        """What a computation of the model reads for a node."""
        if node not in exact or not _is_wide(node, program.dtype) or node.meta["val"].dim() == 0:
            return copies[node]
        if node not in casts:
            casts[node] = graph.call_function(aten.to.dtype, (copies[node], target))
            casts[node].meta["val"] = _cast(node.meta["val"], program.dtype, target)
        return casts[node]

    def one(value: Any) -> Any:
        return target if value == program.dtype else value

    for node in program.graph.graph.nodes:
        alone = all(source in exact for source in node.all_input_nodes if _is_floating(source))
        copy = copies[node] = graph.node_copy(node, copies.__getitem__ if alone else met)
        if node not in exact:
            if node.op == "call_function":
                copy.args = fx.node.map_aggregate(copy.args, one)
                copy.kwargs = fx.node.map_aggregate(copy.kwargs, one)
            if "val" in node.meta:
                copy.meta["val"] = fx.node.map_aggregate(node.meta["val"], lambda v: _cast(v, program.dtype, target))
    inputs = tuple(replace(spec, dtype=one(spec.dtype)) for spec in program.entry.inputs)
    return replace(
        program,
        graph=fx.GraphModule(torch.nn.Module(), graph),
        entry=replace(program.entry, inputs=inputs),
        dtype=target,
    )


def _exact(program: Program) -> dict[fx.Node, None]:
    """Nodes that the dtype of the model's values says nothing about: integers, and what comes of them and of constants."""
    found: dict[fx.Node, None] = {}
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            if "weight" in node.meta:
                same = program.weights[node.meta["weight"]].kind == "constant"
            else:
                same = not node.meta["val"].dtype.is_floating_point
        else:
            same = node.op == "call_function" and (
                not _is_floating(node) or all(source in found for source in node.all_input_nodes)
            )
        if same:
            found[node] = None
    # What first becomes a number of the model's dtype, and is read by the model alone, is made narrow at once.
    for node in reversed(list(found)):
        if node.op == "call_function" and _is_wide(node, program.dtype):
            first = not any(_is_floating(source) for source in node.all_input_nodes)
            if first and not any(user in found and _is_floating(user) for user in node.users):
                del found[node]
    return found


def _is_floating(node: fx.Node) -> bool:
    """Whether a node gives floating numbers, alone or among others."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(each, torch.Tensor) and each.dtype.is_floating_point for each in values)


def _is_wide(node: fx.Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def _cast(value: Any, model: torch.dtype, target: torch.dtype) -> Any:
    """A fake value in the dtype of the run."""
    if not isinstance(value, torch.Tensor) or value.dtype != model:
        return value
    mode = getattr(value, "fake_mode", None)
    if mode is None:
        return value.to(target)
    with mode:
        return value.to(target)
