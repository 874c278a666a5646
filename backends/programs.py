"""`lower(program, target)`: a Program becomes a callable of generated kernels, by the same way as Dynamo's graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.backends.prepare import decompositions
from graphopt.backends.replay import Capture, Replay, cuda_graph, obstacle
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program, specialise
from graphopt.ir.run import bind_inputs, specialised
from graphopt.ir.shapes import symbols


@dataclass
class LoweredProgram:
    """A program with its weights on a device and its graph as kernels; call it as `program.module()`'s result.

    `symbols` names the dimensions that stayed symbolic in the groups' formulae.
    """

    program: Program
    lowered: Lowered
    device: str
    dtype: torch.dtype
    symbols: Mapping[sympy.Symbol, sympy.Symbol]
    _weights: list[torch.Tensor] | None = field(default=None, repr=False)

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Run on inputs by name; returns a tuple as in `entry.outputs`."""
        return self._run(lambda *arguments: tuple(self.lowered(list(arguments))), inputs)

    def replayed(self, capture: Capture | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The program by CUDA graphs: called with inputs by name, it launches all kernels of a step at once.

        Caches must stay where they are from step to step, and every set of shapes is recorded once. `capture` records
        otherwise than by CUDA. Raises PlanError when launches cannot be repeated, with the reason.
        """
        reason = obstacle(self.lowered)
        if reason is None and capture is None and self.device == "cpu":
            reason = "a CPU has no graphs of launches"
        if reason is not None:
            raise PlanError.of("no_replay", f"the program cannot be replayed: {reason}")
        held = [True] * len(self._names())
        held += [spec.role == "cache" for spec in self.program.entry.inputs]
        replay = Replay(lambda *arguments: tuple(self.lowered(list(arguments))), held, capture or cuda_graph)
        return lambda **inputs: self._run(replay, inputs)

    def _names(self) -> list[str]:
        return [node.meta["weight"] for node in self.program.graph.graph.nodes if "weight" in node.meta]

    def _run(self, run: Callable[..., Any], inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        if self._weights is None:
            names = self._names()
            self._weights = [self.program.weights.evaluate(name, self.dtype, self.device) for name in names]
        # What was compiled for inputs without holes must not get positions that are one row for the whole batch.
        bound = [value.contiguous() for value in bind_inputs(self.program, inputs, self.device, self.dtype)]
        with torch.no_grad():
            return tuple(run(*self._weights, *bound))


def lower(
    program: Program,
    target: str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> LoweredProgram:
    """Lower a program for `target` ("cpu" or "cuda"); `sizes` fixes dimensions, so that kernels may rely on them.

    With every dimension but the cache's fixed to one token, products become matrix-vector kernels. Raises PlanError for
    an unknown option or dimension.
    """
    unknown = sorted(set(sizes or {}) - {dim.name for dim in program.dims})
    if unknown:
        raise PlanError.of("unknown_dimension", f"the program has no dimension {unknown[0]!r}")
    kind = dtype or program.dtype
    chosen = Options.of(options)
    if chosen.spec is not None:
        raise PlanError.of("spec_on_program", "lower takes no spec", help=("call graphopt.compile(program, spec)",))
    graph, names = traced(program, kind, sizes or {}, chosen.decompositions(target), target)
    return LoweredProgram(program, lower_graph(graph, target, chosen), target, kind, names)


def traced(
    program: Program,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    table: Mapping[Any, Any] | None = None,
    target: str = "cpu",
) -> tuple[fx.GraphModule, dict[sympy.Symbol, sympy.Symbol]]:
    """The program's aten graph in `dtype`, taken apart by `table` (that of kernels, when None), and its symbols' names.

    It is traced on a CPU; what it makes from nothing is made on `target`.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    free = tuple(dim for dim in program.dims if dim.name not in sizes)
    found: dict[str, Any] = {**symbols(free, mode.shape_env), **sizes}
    inputs = {spec.name: spec for spec in program.entry.inputs}
    arguments = []
    with mode, torch.no_grad():
        for node in program.graph.graph.nodes:
            if node.op != "placeholder":
                continue
            if "weight" in node.meta:
                expr = program.weights[node.meta["weight"]].expr
                shape, kind = expr.shape, expr.dtype
            else:
                spec = inputs[node.meta["input"]]
                shape, kind = tuple(found[s] if isinstance(s, str) else s for s in spec.shape), spec.dtype
            arguments.append(
                torch.empty(shape, dtype=specialise(kind, model=program.dtype, target=dtype, device="cpu"))
            )
        graph = specialised(program, dtype, "cpu")
        apart = decompositions() if table is None else dict(table)
        made = make_fx(graph, decomposition_table=apart, tracing_mode="real")(*arguments)
    made.graph.eliminate_dead_code()
    move(made.graph, target)
    names = {found[dim.name].node.expr: sympy.Symbol(dim.name, positive=True, integer=True) for dim in free}
    return made, names


def move(graph: fx.Graph, target: str) -> None:
    """Let the calls of a graph that name a device name `target`, in place."""

    def one(value: Any) -> Any:
        return torch.device(target) if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, one)  # type: ignore[assignment]
        node.kwargs = fx.node.map_aggregate(dict(node.kwargs), one)  # type: ignore[assignment]
