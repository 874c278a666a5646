"""Running a program: eagerly, as generated Python over aten and graphopt ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.ir.program import Program, specialise


def bind_inputs(program: Program, given: dict[str, Any], device: torch.device | str) -> list[torch.Tensor]:
    """Order inputs as the graph takes them; fills padding with ones and positions with 0..S-1 when they are left out.

    Raises TypeError when a required input is missing or unknown.
    """
    names = [spec.name for spec in program.entry.inputs]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise TypeError(f"unknown inputs {unknown}; this program takes {names}")
    tokens = next((spec.name for spec in program.entry.inputs if spec.role == "tokens"), None)
    bound = []
    for spec in program.entry.inputs:
        value = given.get(spec.name)
        if value is None and tokens is not None and given.get(tokens) is not None:
            ids = given[tokens]
            if spec.role == "padding":
                value = torch.ones_like(ids)
            elif spec.role == "positions":
                value = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        if value is None:
            raise TypeError(f"input {spec.name!r} {list(spec.shape)} is missing; this program takes {names}")
        bound.append(value.to(device))
    return bound


def specialised(program: Program, target: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A copy of the graph whose dtype and device constants fit a run in `target` on `device`."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        copy = graph.node_copy(node, lambda n: mapping[n])
        if node.op == "call_function":
            copy.args = fx.node.map_aggregate(
                copy.args, lambda a: specialise(a, model=program.dtype, target=target, device=device)
            )
            copy.kwargs = fx.node.map_aggregate(
                copy.kwargs, lambda a: specialise(a, model=program.dtype, target=target, device=device)
            )
        mapping[node] = copy
    return fx.GraphModule(torch.nn.Module(), graph)


class Runner:
    """A program with its weights evaluated once, callable many times."""

    def __init__(self, program: Program, dtype: torch.dtype | None, device: torch.device | str) -> None:
        self.program = program
        self.device = device
        self.dtype = dtype
        self.graph = specialised(program, dtype or program.dtype, device)
        names = [node.meta["weight"] for node in program.graph.graph.nodes if "weight" in node.meta]
        self.values = [program.weights.evaluate(name, dtype, device) for name in names]

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Run on inputs by name."""
        result = self.graph(*self.values, *bind_inputs(self.program, inputs, self.device))
        return tuple(result)
