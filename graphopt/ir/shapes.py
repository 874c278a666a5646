"""Shape propagation: every node gets a fake tensor in `meta["val"]`, with the program's named dimensions as symbols."""

from __future__ import annotations

from dataclasses import dataclass
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
        n.meta["from"] = _origin(n)
        return result


@dataclass(frozen=True)
class _Origin:
    """What a node's value was computed from: the op, its arguments as text and the very values that it read."""

    target: Any
    text: str
    read: tuple[Any, ...]

    def is_still(self, other: _Origin) -> bool:
        same = self.target is other.target and self.text == other.text and len(self.read) == len(other.read)
        return same and all(a is b for a, b in zip(self.read, other.read, strict=True))


def _origin(node: fx.Node) -> _Origin:
    read: list[Any] = []

    def hole(source: fx.Node) -> str:
        read.append(source.meta.get("val"))
        return "%"

    # As text, because 1, 1.0 and True are equal and mean different things.
    arguments = fx.node.map_arg((node.args, node.kwargs), hole)
    return _Origin(node.target, repr(arguments), tuple(read))


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


def repropagate(graph: fx.GraphModule, weights: WeightStore, dims: tuple[Dim, ...], entry: Entry) -> None:
    """As `propagate`, for a graph most of whose nodes have their values: only what reads something else runs again.

    `dims` are those of the values. A result that is as it was stays the same object, so that a change ends where it
    changes nothing.
    """
    nodes = list(graph.graph.nodes)
    modes = [getattr(node.meta.get("val"), "fake_mode", None) for node in nodes if node.op == "placeholder"]
    mode = next((mode for mode in modes if mode is not None), None)
    if mode is None or not all("val" in node.meta for node in nodes if "input" in node.meta):
        propagate(graph, weights, dims, entry)
        return
    run = _Propagate(graph, mode)
    with enable_python_dispatcher(), mode:
        for node in nodes:
            if node.op == "output":
                continue
            old = node.meta.get("val")
            if "weight" in node.meta:
                expr = weights[node.meta["weight"]].expr
                if old is None or tuple(old.shape) != expr.shape or old.dtype != expr.dtype:
                    node.meta["val"] = torch.empty(expr.shape, dtype=expr.dtype)
            elif node.op != "placeholder" and not _current(node):
                made = run.run_node(node)
                if old is not None and _alike(old, made):
                    node.meta["val"] = old
            run.env[node] = node.meta["val"]


def _current(node: fx.Node) -> bool:
    origin = node.meta.get("from")
    return origin is not None and "val" in node.meta and origin.is_still(_origin(node))


def _alike(old: Any, new: Any) -> bool:
    """Whether two values of a node have the same type, sizes and layout; symbols are compared as expressions."""
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return _layout(old) == _layout(new)
    if isinstance(old, torch.SymInt) and isinstance(new, torch.SymInt):
        return bool(old.node.expr == new.node.expr)
    if isinstance(old, tuple | list) and isinstance(new, tuple | list):
        return len(old) == len(new) and all(_alike(a, b) for a, b in zip(old, new, strict=True))
    return type(old) is type(new) and isinstance(old, bool | int | float) and old == new


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    numbers = (*value.shape, *value.stride(), value.storage_offset())
    sizes = tuple(n.node.expr if isinstance(n, torch.SymInt) else n for n in numbers)
    return value.dtype, value.device, value.dim(), sizes
