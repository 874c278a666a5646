"""A part of a program as a program of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.ir.program import Input, Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.rewriter import Rewriter


def extract(program: Program, outputs: Sequence[str], cut: Mapping[str, Input] | None = None) -> Program:
    """What gives some results, by name; each result in `cut` becomes an input instead, and is not computed.

    Inputs and weights that this part does not read are gone.
    """
    rewriter = Rewriter(program)
    named = dict(zip(program.entry.outputs, program.output_nodes, strict=True))
    unread = {spec.name for spec in program.entry.inputs if not rewriter.input_node(spec.name).users}
    rewriter.only_outputs(outputs)
    for name, spec in (cut or {}).items():
        rewriter.node(named[name]).replace_all_uses_with(rewriter.add_input(spec))
    eliminate_dead_code(rewriter.graph)
    for spec in program.entry.inputs:
        if not rewriter.input_node(spec.name).users and (cut or spec.name not in unread):
            rewriter.drop_input(spec.name)
    return rewriter.finish()
