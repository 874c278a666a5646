"""Shape propagation: every node gets a fake tensor in `meta["val"]`, with the program's named dimensions as symbols."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, SymInt
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.ir.program import Dim, Entry
from graphopt.ir.weights import WeightStore


class _Propagate(FakeTensorProp):  # type: ignore[misc]
    """Propagate and keep whatever a node returns, symbolic integers included."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = fx.Interpreter.run_node(self, n)
        except Exception as error:
            error.add_note(f"while propagating shapes through node %{n.name} = {n.target}")
            raise
        n.meta["val"] = result
        return result


def symbols(dims: tuple[Dim, ...], env: ShapeEnv) -> dict[str, SymInt]:
    """One symbolic size a dimension, created in `env` with the dimension's hint and range."""
    made: dict[str, SymInt] = {}
    for dim in dims:
        source = ConstantSource(dim.name)
        symbol = env.create_symbol(dim.hint, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        made[dim.name] = env.create_symintnode(symbol, hint=dim.hint, source=source)
    return made


def propagate(graph: fx.GraphModule, weights: WeightStore, dims: tuple[Dim, ...], entry: Entry) -> dict[str, Any]:
    """Set `meta["val"]` on all nodes; returns the sympy symbol of each dimension by name.

    Raises whatever the first ill-typed node raises, with a note that names the node.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    sizes = symbols(dims, env)
    inputs = {spec.name: spec for spec in entry.inputs}
    arguments = []
    with mode:
        for node in graph.graph.nodes:
            if node.op != "placeholder":
                continue
            if "weight" in node.meta:
                expr = weights[node.meta["weight"]].expr
                arguments.append(torch.empty(expr.shape, dtype=expr.dtype))
            else:
                spec = inputs[node.meta["input"]]
                shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
                arguments.append(torch.empty(shape, dtype=spec.dtype))
    # The Python dispatcher lets shape functions written in Python see symbolic sizes (baddbmm needs it).
    with enable_python_dispatcher():
        _Propagate(graph, mode).propagate_dont_convert_inputs(*arguments)
    return {name: size.node.expr for name, size in sizes.items()}
