"""Running a program: eagerly, as generated Python over aten and graphopt ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.ir.by_expert import lower_banks
from graphopt.ir.grouped import lower_choices
from graphopt.ir.narrow import narrowed
from graphopt.ir.program import Input, Program, specialise
from graphopt.ops.trees import straight


def bind_inputs(
    program: Program, given: dict[str, Any], device: torch.device | str, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Order inputs as the graph takes them, filling those that have a plain meaning when they are left out.

    Padding becomes ones, positions 0..S-1, and there are no pictures. A program with a cache runs as a stateless one:
    empty caches of S slots, lengths 0, tokens that see those before them. Caches of another floating dtype than
    `dtype` are copied, so that what the run writes stays in the copy. Raises TypeError when a required input is missing
    or unknown.
    """
    names = [spec.name for spec in program.entry.inputs]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise TypeError(f"unknown inputs {unknown}; this program takes {names}")
    held = {spec.role: given.get(spec.name) for spec in program.entry.inputs}
    target = dtype or program.dtype
    bound = []
    for spec in program.entry.inputs:
        value = given.get(spec.name)
        if value is None and held.get("tokens") is not None:
            value = _usual(spec, held["tokens"], held.get("lengths"), program.dtype, target, device)
        if value is None:
            raise TypeError(f"input {spec.name!r} {list(spec.shape)} is missing; this program takes {names}")
        if spec.role == "cache":
            value = value.to(specialise(spec.dtype, model=program.dtype, target=target, device=device))
        bound.append(value.to(device))
    return bound


def _usual(
    spec: Input,
    ids: torch.Tensor,
    lengths: torch.Tensor | None,
    model: torch.dtype,
    target: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor | None:
    """The value of an input that was left out, for tokens `[B, S]`; None when it has no usual one."""
    batch, count = ids.shape[:2]
    if spec.role == "padding":
        return torch.ones_like(ids)
    if spec.role == "prompt":
        return torch.ones_like(ids if lengths is None else ids[:, :0])
    if spec.role == "entries":
        return torch.zeros(batch, dtype=torch.int64)
    if spec.role == "pictures":
        return torch.zeros(0, *spec.shape[1:], dtype=specialise(spec.dtype, model=model, target=target, device=device))
    if spec.role == "positions":
        steps = torch.arange(count, device=ids.device).expand(batch, -1)
        return steps if lengths is None else lengths.to(ids.device)[:, None] + steps
    if spec.role == "ahead":
        further = int(spec.shape[-1])
        return torch.nn.functional.pad(ids, (0, further)).unfold(1, further, 1)[:, 1:]
    if spec.role == "lengths":
        return torch.zeros(batch, dtype=torch.int64)
    if spec.role == "spans":
        return straight(count)
    if spec.role == "cache" and lengths is None:
        named = {size: count for size in spec.shape if isinstance(size, str) and size.startswith("C")}
        shape = [size if isinstance(size, int) else named.get(size, batch) for size in spec.shape]
        dtype = specialise(spec.dtype, model=model, target=target, device=device)
        # Signed numbers say which token an entry holds: none.
        return torch.full(shape, -1 if dtype == torch.int64 else 0, dtype=dtype, device=device)
    return None


def specialised(program: Program, target: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A copy of the graph whose dtype and device constants fit a run in `target` on `device`."""
    program = narrowed(program, target)
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


def runnable(program: Program, target: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A specialised copy that is only run: what has a faster form is computed in it, under the same node names."""
    graph = specialised(program, target, device)
    lower_choices(graph.graph)
    graph.recompile()
    return graph


def fastest(program: Program, target: torch.dtype, device: torch.device | str) -> fx.GraphModule:
    """A specialised copy of which only the results are wanted: banks of experts run as a whole."""
    graph = specialised(program, target, device)
    lower_banks(graph)
    lower_choices(graph.graph)
    graph.recompile()
    return graph


class Runner:
    """A program with its weights evaluated once, callable many times."""

    def __init__(self, program: Program, dtype: torch.dtype | None, device: torch.device | str) -> None:
        self.program = program
        self.device = device
        self.dtype = dtype
        self.graph = fastest(program, dtype or program.dtype, device)
        names = [node.meta["weight"] for node in program.graph.graph.nodes if "weight" in node.meta]
        self.values = [program.weights.evaluate(name, dtype, device) for name in names]

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Run on inputs by name."""
        result = self.graph(*self.values, *bind_inputs(self.program, inputs, self.device, self.dtype))
        return tuple(result)
