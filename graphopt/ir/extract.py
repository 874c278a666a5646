"""A part of a program as a program of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt.ir.program import Input, Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.rewriter import Rewriter


def extract(program: Program, outputs: Sequence[str], cut: Mapping[str, Input] | None = None) -> Program:
    """What gives some results, by name; each result in `cut` becomes an input instead, and is not computed.

    Inputs and weights that this part does not read are gone, and so are caches that no result of it needs.
    """
    rewriter = Rewriter(program)
    named = dict(zip(program.entry.outputs, program.output_nodes, strict=True))
    unread = {spec.name for spec in program.entry.inputs if not rewriter.input_node(spec.name).users}
    rewriter.only_outputs(outputs)
    for name, spec in (cut or {}).items():
        rewriter.node(named[name]).replace_all_uses_with(rewriter.add_input(spec))
    caches = {spec.name for spec in program.entry.inputs if spec.role == "cache"}
    eliminate_dead_code(rewriter.graph, lambda node: _writes_alone(node, caches))
    for spec in program.entry.inputs:
        if not rewriter.input_node(spec.name).users and (cut or spec.name not in unread):
            rewriter.drop_input(spec.name)
    return rewriter.finish()


def _writes_alone(node: fx.Node, caches: set[str]) -> bool:
    """Whether a node changes nothing but caches."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    written = [
        value
        for value, argument in zip(node.args, node.target._schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return all(isinstance(value, fx.Node) and value.meta.get("input") in caches for value in written)
