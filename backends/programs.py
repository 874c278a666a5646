"""`lower(program, target)`: a Program becomes a callable of generated kernels, by the same way as Dynamo's graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.backends.cpu import library_graph
from graphopt.backends.direct import calls as count_calls
from graphopt.backends.lowering import Options, lower_graph
from graphopt.backends.prepare import decompositions
from graphopt.backends.report import library_reports
from graphopt.backends.running import Lowered, LoweredProgram
from graphopt.cost.count import dimension_names
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program, specialise
from graphopt.ir.run import specialised
from graphopt.ir.shapes import symbols


def lower(
    program: Program,
    target: str = "cpu",
    *,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> LoweredProgram:
    """Lower a program for `target` ("cpu" or "cuda"); `sizes` fixes dimensions, so that kernels may rely on them.

    With every dimension but the cache's fixed to one token, products become matrix-vector kernels. What library calls on
    a CPU serve is not traced and serves every size. Raises PlanError for an unknown option or dimension.
    """
    unknown = sorted(set(sizes or {}) - {dim.name for dim in program.dims})
    if unknown:
        raise PlanError.of("unknown_dimension", f"the program has no dimension {unknown[0]!r}")
    kind = dtype or program.dtype
    chosen = Options.of(options)
    if chosen.spec is not None:
        raise PlanError.of("spec_on_program", "lower takes no spec", help=("call graphopt.compile(program, spec)",))
    if not chosen.kernels_on(target) and chosen.cpu == "eager":
        calls = library_reports(program.graph.graph, ())
        module, packed = library_graph(program, kind, chosen.pack)
        lowered = Lowered(
            module.forward, target, "eager library calls", library=count_calls(module.graph), calls=calls, graph=module
        )
        return LoweredProgram(program, lowered, target, kind, dimension_names(program), packed)
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
                name = node.meta["weight"]
                shape, kind = program.weights[name].expr.shape, program.weights.run_dtype(name, dtype)
            else:
                spec = inputs[node.meta["input"]]
                shape = tuple(found[s] if isinstance(s, str) else s for s in spec.shape)
                kind = specialise(spec.dtype, model=program.dtype, target=dtype, device="cpu")
            arguments.append(torch.empty(shape, dtype=kind))
        graph = specialised(program, dtype, "cpu")
        apart = decompositions() if table is None else dict(table)
        # Composite ops of torch 2.11 take symbolic sizes only in Python.
        with enable_python_dispatcher():
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
