"""Looking at the values of a mask, which depend on places alone."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.ir.program import Program, specialise
from graphopt.passes.cache.sequence import Sequence, expression, is_tensors

_HIDDEN = -1e4
_BATCH, _LENGTH = 2, 11


def hides_later(sequence: Sequence, mask: fx.Node) -> bool:
    """Whether a mask `[.., S, T]` hides every later token at a length that was not captured, whatever its weights are."""
    value = _value(sequence, mask)
    if value.shape[-2:] != (_LENGTH, _LENGTH):
        return False
    later = torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).triu(1).expand(value.shape)
    return not bool(value[later].any()) if value.dtype == torch.bool else bool((value[later] < _HIDDEN).all())


def _value(sequence: Sequence, node: fx.Node) -> torch.Tensor:
    """Run what lies behind a node, with padding of ones and parameters of zero."""
    wanted, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in wanted:
                wanted.add(source)
                stack.append(source)
    program = sequence.program
    values: dict[fx.Node, object] = {}
    for current in program.graph.graph.nodes:
        if current not in wanted:
            continue
        if current.op == "placeholder":
            values[current] = _given(program, sequence, current)
        elif not is_tensors(current) or current not in sequence.live:
            args, kwargs = fx.node.map_arg((current.args, dict(current.kwargs)), values.__getitem__)
            args, kwargs = fx.node.map_aggregate(
                (args, kwargs), lambda a: specialise(a, model=program.dtype, target=torch.float32, device="cpu")
            )
            values[current] = current.target(*args, **kwargs)  # type: ignore[operator]
        else:
            # Tokens reach a mask by their sizes alone.
            shape = [_size(sequence, size) for size in current.meta["val"].shape]
            values[current] = torch.zeros(shape)
    result = values[node]
    assert isinstance(result, torch.Tensor)
    return result


def _given(program: Program, sequence: Sequence, node: fx.Node) -> torch.Tensor:
    if "weight" in node.meta:
        weight = program.weights[node.meta["weight"]]
        if weight.kind == "constant":
            return program.weights.evaluate(weight.name, torch.float32)
        dtype = torch.float32 if weight.expr.dtype.is_floating_point else weight.expr.dtype
        return torch.zeros(weight.expr.shape, dtype=dtype)
    shape = [_size(sequence, size) for size in node.meta["val"].shape]
    if sequence.role(node) == "positions":
        return torch.arange(_LENGTH).expand(shape)
    return torch.ones(shape, dtype=node.meta["val"].dtype)


def _size(sequence: Sequence, size: object) -> int:
    found = expression(size).subs({sequence.batch: _BATCH, sequence.length: _LENGTH})
    return int(found) if found.is_Integer else 3
