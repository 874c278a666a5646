"""Verification of a model that does not fit into memory: some blocks are verified, the others passed by.

Original and result lose the same blocks, what is left runs as a stream in float64, and the certificate names the blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.run import bind_inputs, specialised
from graphopt.observe.stream import Limits, Visit, cut, stream
from graphopt.passkit.edits import Edit, emulate_edits
from graphopt.views import Block, Views

BLOCKS = 2
SHAPES = ({"B": 1, "S": 1}, {"B": 2, "S": 7})

Compare = Callable[[int, str, torch.Tensor, torch.Tensor], float]


def sampled(
    before: Program,
    after: Program,
    edits: tuple[Edit, ...],
    inputs: list[dict[str, torch.Tensor]],
    limits: Limits,
    compare: Compare,
) -> dict[str, Any]:
    """Compare `after` with the emulation of `edits` (the original, for none) on some blocks; what a certificate says.

    A removed block is among them when one was removed. Where the blocks of both cannot be told, all of them are run.
    """
    views = Views(before)
    chosen = _choose(before, after)
    passed = _others(views, chosen)
    reference = emulate_edits(before, views, edits, passed) if edits or passed else before
    if chosen is not None:
        after = _without(after, _others(Views(after), chosen))
    errors: list[float] = []
    expected: list[tuple[torch.Tensor, ...]] = [()] * len(inputs)

    def remember(batch: int, values: tuple[Any, ...]) -> None:
        expected[batch] = values

    def check(batch: int, values: tuple[Any, ...]) -> None:
        for name, got, wanted in zip(after.entry.outputs, values, expected[batch], strict=True):
            errors.append(compare(batch, name, got, wanted))

    for program, act in ((reference, remember), (after, check)):
        _run(program, inputs, limits, act)
    return {
        "blocks": [block.path for block in chosen] if chosen is not None else "all",
        "of_blocks": len(views.blocks),
        "streamed": True,
        "largest_relative_error": max(errors),
    }


def read_by(before: Program, after: Program, limits: Limits | None) -> tuple[set[str], set[str]]:
    """The weights that a comparison of two programs reads of each: all, or with `limits` those of the sample."""
    chosen = _choose(before, after) if limits is not None else None
    found = []
    for program in (before, after):
        if chosen is not None:
            program = _without(program, _others(Views(program), chosen))
        looked_up = {
            node.args[0].meta["weight"]  # type: ignore[union-attr]
            for node in program.graph.graph.nodes
            if node.target is torch.ops.aten.embedding.default and limits is not None
        }
        tied = {n for n, w in program.weight_nodes.items() if n in looked_up and len(w.users) > 1}
        found.append({n for n, w in program.weights.weights.items() if w.kind != "constant"} - (looked_up - tied))
    return found[0], found[1]


def _choose(before: Program, after: Program) -> list[Block] | None:
    """A removed block and others that stayed, drawn with a fixed seed; None when blocks do not correspond."""
    old, new = Views(before).blocks, {block.exit.name for block in Views(after).blocks}
    stayed = [block for block in old if block.exit.name in new]
    if len(old) <= BLOCKS or len(stayed) != len(new) or not stayed:
        return None
    gone = [block for block in old if block.exit.name not in new]
    draw = random.Random(0)
    picked = draw.sample(stayed, min(BLOCKS, len(stayed))) + (draw.sample(gone, 1) if gone else [])
    return sorted(picked, key=lambda block: block.index)


def _others(views: Views, chosen: list[Block] | None) -> list[Block]:
    keep = {block.exit.name for block in chosen or views.blocks}
    return [block for block in views.blocks if block.exit.name not in keep]


def _without(program: Program, blocks: list[Block]) -> Program:
    rewriter = Rewriter(program)
    for block in blocks:
        rewriter.bypass(rewriter.node(block.exit.name), rewriter.node(block.entry.name))
    return rewriter.finish()


def _run(
    program: Program,
    inputs: list[dict[str, torch.Tensor]],
    limits: Limits,
    act: Callable[[int, tuple[Any, ...]], None],
) -> None:
    graph = specialised(program, torch.float64, "cpu")
    names = [node.name for node in program.graph.graph.nodes if "input" in node.meta]
    bound = [dict(zip(names, bind_inputs(program, each, "cpu"), strict=True)) for each in inputs]
    visit = Visit(tuple(node.name for node in program.output_nodes), act)
    segments = cut(program, graph, [visit], dtype=torch.float64, limits=limits)
    with torch.no_grad():
        stream(program, segments, bound, dtype=torch.float64, limits=limits)
