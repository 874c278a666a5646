"""Running batches through a program as a stream: weights come and go by segments, all batches pass each segment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.reach import ancestors
from graphopt.observe.spill import Spill
from graphopt.views import Views

aten = torch.ops.aten
PIECE = 64 << 20
Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Limits:
    """What a stream may hold: bytes of weights in one segment, bytes of activations between segments.

    What does not fit is cut into smaller segments and written to a file in `directory`. `split` lets products be
    computed by blocks of rows of their weight, which changes the last bits of a result.
    """

    weights: int | None = None
    activations: int | None = None
    directory: Path | None = None
    split: bool = False


@dataclass(frozen=True)
class Visit:
    """Nodes to look at: `act(batch, values)` is called for each batch, and `done()` after the last."""

    nodes: tuple[str, ...]
    act: Callable[[int, tuple[Any, ...]], None]
    done: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Segment:
    """Nodes between two points of the stream, the weights they read, what dies and who visits after each node.

    `rows` is set where the only node is a product that reads its weight by rows; `weights` leaves out what only
    lookups read, which take the rows that they need.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    lookups: frozenset[fx.Node]
    dead: Mapping[fx.Node, tuple[fx.Node, ...]]
    visits: Mapping[fx.Node, tuple[Visit, ...]]
    rows: bool = False


def stream(
    program: Program,
    segments: Sequence[Segment],
    batches: Sequence[Inputs],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    limits: Limits = Limits(),
    step: Callable[[], None] = lambda: None,
) -> Spill:
    """Run batches (values by placeholder name) through segments; `step` is called after each batch of each segment."""
    spill = Spill(limits.activations, limits.directory, len(batches))
    alive: list[Any] = [{} for _ in batches]
    by_name = {node.name: node for segment in segments for node in segment.nodes}

    def after(segment: Segment, node: fx.Node, batch: int, values: dict[fx.Node, Any]) -> None:
        for visit in segment.visits.get(node, ()):
            visit.act(batch, tuple(values[by_name[name]] for name in visit.nodes))
        for gone in segment.dead.get(node, ()):
            del values[gone]

    for segment in segments:
        if segment.rows and batches:
            node = segment.nodes[0]
            current = [spill.get(kept) for kept in alive]
            for values, result in zip(current, _by_rows(program, node, current, dtype, device), strict=True):
                values[node] = result
            for batch, values in enumerate(current):
                after(segment, node, batch, values)
                alive[batch] = spill.put(batch, values)
                step()
        else:
            read = segment.weights if batches else ()
            weights = {each: program.weights.evaluate(each.meta["weight"], dtype, device) for each in read}
            for batch, inputs in enumerate(batches):
                values = spill.get(alive[batch])
                alive[batch] = None
                both = Layered(weights, values)
                for node in segment.nodes:
                    if node in segment.lookups:
                        values[node] = _lookup(program, node, values, dtype, device)
                    else:
                        values[node] = inputs[node.name] if node.op == "placeholder" else compute(node, both)
                    after(segment, node, batch, values)
                alive[batch] = spill.put(batch, values)
                step()
            del weights
        for visits in segment.visits.values():
            for visit in visits:
                visit.done()
    return spill


class Layered(dict[fx.Node, Any]):
    """Values over weights, without copying either."""

    def __init__(self, weights: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> None:
        super().__init__()
        self._weights, self._values = weights, values

    def __missing__(self, node: fx.Node) -> Any:
        return self._weights[node] if "weight" in node.meta else self._values[node]


def compute(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """One node's value."""
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def cut(
    program: Program,
    graph: fx.GraphModule,
    visits: Sequence[Visit],
    *,
    dtype: torch.dtype | None,
    views: Views | None = None,
    limits: Limits = Limits(),
) -> list[Segment]:
    """Segments that reach all visits: they end at block exits, and earlier where their weights exceed the limit."""
    order = list(graph.graph.nodes)
    index = {node.name: i for i, node in enumerate(order)}
    ends = [max(index[name] for name in visit.nodes) for visit in visits]
    needed = ancestors([order[index[name]] for visit in visits for name in visit.nodes])
    exits = {index[block.exit.name] for block in (views or Views(program)).blocks}
    last_use: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        if node in needed:
            for source in node.all_input_nodes:
                last_use[source] = i
    for visit, end in zip(visits, ends, strict=True):
        for name in visit.nodes:
            last_use[order[index[name]]] = max(end, last_use.get(order[index[name]], -1))
    dying: dict[int, list[fx.Node]] = {}
    for source, use in last_use.items():
        if "weight" not in source.meta:
            dying.setdefault(use, []).append(source)
    ready: dict[int, list[Visit]] = {}
    for visit, end in zip(visits, ends, strict=True):
        ready.setdefault(end, []).append(visit)

    def made(inside: list[fx.Node], rows: bool = False) -> Segment:
        lookups = frozenset(node for node in inside if _looks_up(program, node, dtype))
        read = dict.fromkeys(s for n in inside if n not in lookups for s in n.all_input_nodes if "weight" in s.meta)
        return Segment(
            tuple(inside),
            tuple(read),
            lookups,
            {node: tuple(dying[index[node.name]]) for node in inside if index[node.name] in dying},
            {node: tuple(ready[index[node.name]]) for node in inside if index[node.name] in ready},
            rows,
        )

    found: list[Segment] = []
    inside: list[fx.Node] = []
    read: dict[fx.Node, int] = {}

    def close() -> None:
        if inside:
            found.append(made(inside))
        inside.clear()
        read.clear()

    for i, node in enumerate(order[: max(ends) + 1]):
        if node in needed and "weight" not in node.meta:
            if limits.split and _multiplies(program, node, dtype):
                close()
                found.append(made([node], rows=True))
                continue
            read_here = () if _looks_up(program, node, dtype) else node.all_input_nodes
            more = {s: _bytes(program, s, dtype) for s in read_here if "weight" in s.meta}
            if limits.weights is not None and inside and sum({**read, **more}.values()) > limits.weights:
                close()
            inside.append(node)
            read.update(more)
        if i in exits:
            close()
    close()
    return found


def _bytes(program: Program, weight: fx.Node, dtype: torch.dtype | None) -> int:
    expr = program.weights[weight.meta["weight"]].expr
    size = (dtype or expr.dtype) if expr.dtype.is_floating_point else expr.dtype
    return math.prod(expr.shape) * int(size.itemsize)


def _looks_up(program: Program, node: fx.Node, dtype: torch.dtype | None) -> bool:
    """Whether a node looks up rows of a large weight, so that the weight need not be whole."""
    return node.target is aten.embedding.default and _large(program, node.args[0], dtype)


def _multiplies(program: Program, node: fx.Node, dtype: torch.dtype | None) -> bool:
    """Whether a node is a product with one large weight, which may be read by rows."""
    if node.target is not aten.linear.default or not _large(program, node.args[1], dtype):
        return False
    return isinstance(node.args[0], fx.Node) and "weight" not in node.args[0].meta


def _large(program: Program, weight: Any, dtype: torch.dtype | None) -> bool:
    if not isinstance(weight, fx.Node) or "weight" not in weight.meta:
        return False
    expr = program.weights[weight.meta["weight"]].expr
    return _bytes(program, weight, dtype) > PIECE and expr.rows(0, 1) is not None


def _lookup(
    program: Program,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> torch.Tensor:
    weight, ids = node.args[:2]
    unique, place = torch.unique(values[ids], return_inverse=True)  # type: ignore[index]
    rows = program.weights.rows(weight.meta["weight"], unique.tolist(), dtype, device)  # type: ignore[union-attr]
    return rows[place]


def _by_rows(
    program: Program,
    node: fx.Node,
    alive: Sequence[Mapping[fx.Node, Any]],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Iterator[torch.Tensor]:
    store = program.weights
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    added: torch.Tensor | None = None
    if isinstance(bias, fx.Node):
        added = store.evaluate(bias.meta["weight"], dtype, device) if "weight" in bias.meta else None
    results: list[list[torch.Tensor]] = [[] for _ in alive]
    done = 0
    for piece in store.pieces(weight.meta["weight"], PIECE, dtype, device):  # type: ignore[union-attr]
        for values, result in zip(alive, results, strict=True):
            whole = values[bias] if isinstance(bias, fx.Node) and added is None else added
            here = None if whole is None else whole[done : done + len(piece)]
            result.append(torch.nn.functional.linear(values[x], piece, here))  # type: ignore[index]
        done += len(piece)
    for result in results:
        yield torch.cat(result, dim=-1)
