"""Observation in one streaming pass: calibration text goes through a program block by block, weights come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError, did_you_mean
from graphopt.ir.program import Program
from graphopt.ir.run import bind_inputs, specialised
from graphopt.observe.accumulate import ACCUMULATORS, Accumulator, Tokens
from graphopt.observe.taps import Statistic, Statistics, Tap
from graphopt.observe.text import next_token_loss, token_input
from graphopt.views import Views

Batch = Mapping[str, torch.Tensor]
Progress = Callable[[int, int], None]


def observe(
    program: Program,
    taps: Iterable[Tap],
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    views: Views | None = None,
) -> Statistics:
    """Collect statistics of nodes over batches of inputs by name (`input_ids` `[B, S]`, padding, ...).

    One pass: the weights of one block are evaluated at a time and all batches run through it, so that memory is one
    block plus the live values of the batches. Padded tokens do not count. `taylor` taps instead run the whole program
    with gradients, one batch at a time, with all weights and that batch's activations in memory. `progress(done,
    total)` is told after each batch of each block. Raises PlanError for an unknown node, no text, a NaN or infinity.
    """
    wanted = tuple(dict.fromkeys(taps))
    if not wanted:
        return Statistics({})
    runs = [_bound(program, batch, device) for batch in batches]
    if not runs:
        raise PlanError.of(
            "no_calibration", "there is no calibration text to observe", help=("add calibration: {data: FILE, ...}",)
        )
    _check_nodes(program, wanted)
    accumulators = {tap: ACCUMULATORS[tap.kind](tap) for tap in wanted}
    streamed = {tap: made for tap, made in accumulators.items() if tap.kind != "taylor"}
    graded = {tap: made for tap, made in accumulators.items() if tap.kind == "taylor"}
    graph = specialised(program, dtype, device)
    plan = _segments(program, graph, list(streamed), views) if streamed else []
    total = len(runs) * (len(plan) + bool(graded))
    step = _Counter(progress, total)
    with torch.no_grad():
        _stream(program, plan, runs, streamed, dtype, device, step)
    if graded:
        _differentiate(program, graph, runs, graded, dtype, device, step)
    found = {tap: made.result() for tap, made in accumulators.items()}
    for tap, statistic in found.items():
        _check_finite(program, tap, statistic)
    return Statistics(found)


@dataclass(frozen=True)
class _Run:
    """One batch: graph inputs by placeholder name, and which tokens count."""

    inputs: dict[str, torch.Tensor]
    tokens: Tokens
    raw: Batch


@dataclass(frozen=True)
class _Segment:
    """Nodes between two points of the stream, the weights they read, and what dies after each node."""

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    dead: Mapping[fx.Node, tuple[fx.Node, ...]]
    ready: Mapping[fx.Node, tuple[Tap, ...]]


class _Counter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _bound(program: Program, batch: Batch, device: torch.device | str) -> _Run:
    values = bind_inputs(program, dict(batch), device)
    names = [node.name for node in program.graph.graph.nodes if "input" in node.meta]
    by_role = {spec.role: value for spec, value in zip(program.entry.inputs, values, strict=True)}
    first = by_role.get("tokens", values[0])
    padding = by_role.get("padding")
    shape = first.shape[:2] if first.dim() >= 2 else (first.shape[0], 1)
    mask = padding.to(torch.bool) if padding is not None else torch.ones(shape, dtype=torch.bool, device=first.device)
    return _Run(dict(zip(names, values, strict=True)), Tokens(mask, bool(mask.all())), batch)


def _check_nodes(program: Program, taps: Sequence[Tap]) -> None:
    nodes = program.nodes
    for tap in taps:
        for name in (tap.node, tap.other):
            if name is not None and name not in nodes:
                raise PlanError.of("unknown_node", f"the graph has no node %{name}", help=did_you_mean(name, nodes))
        if (tap.kind == "cosine") != (tap.other is not None):
            raise PlanError.of("tap_other", f"a {tap.kind} tap on %{tap.node} with other={tap.other!r}")


def _segments(program: Program, graph: fx.GraphModule, taps: Sequence[Tap], views: Views | None) -> list[_Segment]:
    order = list(graph.graph.nodes)
    index = {node.name: i for i, node in enumerate(order)}
    ends: dict[Tap, int] = {}
    for tap in taps:
        ends[tap] = max(index[name] for name in (tap.node, tap.other) if name is not None)
    needed = _ancestors([order[index[name]] for tap in taps for name in (tap.node, tap.other) if name is not None])
    exits = sorted({index[block.exit.name] for block in (views or Views(program)).blocks})
    last = max(ends.values())
    bounds = [-1, *(i for i in exits if i < last), last]
    last_use: dict[fx.Node, int] = {}
    for i, node in enumerate(order):
        if node in needed:
            for source in node.all_input_nodes:
                last_use[source] = i
    for tap, end in ends.items():
        for name in (tap.node, tap.other):
            if name is not None:
                last_use[order[index[name]]] = max(end, last_use.get(order[index[name]], -1))
    segments = []
    for start, stop in pairwise(bounds):
        inside = [order[i] for i in range(start + 1, stop + 1) if order[i] in needed]
        nodes = [node for node in inside if "weight" not in node.meta]
        read = dict.fromkeys(s for node in nodes for s in node.all_input_nodes if "weight" in s.meta)
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, use in last_use.items():
            if start < use <= stop and "weight" not in source.meta:
                dead.setdefault(order[use], []).append(source)
        ready: dict[fx.Node, list[Tap]] = {}
        for tap, end in ends.items():
            if start < end <= stop:
                ready.setdefault(order[end], []).append(tap)
        segments.append(
            _Segment(
                tuple(nodes),
                tuple(read),
                {node: tuple(gone) for node, gone in dead.items()},
                {node: tuple(these) for node, these in ready.items()},
            )
        )
    return [segment for segment in segments if segment.nodes]


def _ancestors(start: list[fx.Node]) -> set[fx.Node]:
    seen, stack = set(start), list(start)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _evaluate(
    program: Program, nodes: Iterable[fx.Node], dtype: torch.dtype, device: torch.device | str
) -> dict[fx.Node, Any]:
    return {node: program.weights.evaluate(node.meta["weight"], dtype, device) for node in nodes}


def _compute(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, lambda n: values[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _stream(
    program: Program,
    segments: list[_Segment],
    runs: list[_Run],
    accumulators: Mapping[Tap, Accumulator],
    dtype: torch.dtype,
    device: torch.device | str,
    step: _Counter,
) -> None:
    alive: list[dict[fx.Node, Any]] = [{} for _ in runs]
    by_name = {node.name: node for segment in segments for node in segment.nodes}
    for segment in segments:
        weights = _evaluate(program, segment.weights, dtype, device)
        for run, values in zip(runs, alive, strict=True):
            both = _Layered(weights, values)
            for node in segment.nodes:
                values[node] = run.inputs[node.name] if node.op == "placeholder" else _compute(node, both)
                for tap in segment.ready.get(node, ()):
                    other = values[by_name[tap.other]] if tap.other is not None else None
                    accumulators[tap].add(run.tokens, values[by_name[tap.node]], other)
                for gone in segment.dead.get(node, ()):
                    del values[gone]
            step()


class _Layered(dict[fx.Node, Any]):
    """Values over weights, without copying either."""

    def __init__(self, weights: Mapping[fx.Node, Any], values: Mapping[fx.Node, Any]) -> None:
        super().__init__()
        self._weights, self._values = weights, values

    def __missing__(self, node: fx.Node) -> Any:
        return self._weights[node] if "weight" in node.meta else self._values[node]


def _differentiate(
    program: Program,
    graph: fx.GraphModule,
    runs: list[_Run],
    accumulators: Mapping[Tap, Accumulator],
    dtype: torch.dtype,
    device: torch.device | str,
    step: _Counter,
) -> None:
    """Each sample's own mean next-token loss is differentiated, so that terms do not depend on the batching."""
    order = [node for node in graph.graph.nodes if node.op != "output"]
    result = order[[node.name for node in order].index(program.output_nodes[0].name)]
    needed = _ancestors([result])
    tapped = {tap.node for tap in accumulators}
    weights = _evaluate(program, [node for node in order if "weight" in node.meta and node in needed], dtype, device)
    name = token_input(program)
    for run in runs:
        values: dict[fx.Node, Any] = {}
        watched: dict[str, torch.Tensor] = {}
        both = _Layered(weights, values)
        with torch.enable_grad():
            for node in order:
                if "weight" in node.meta or node not in needed:
                    continue
                value = run.inputs[node.name] if node.op == "placeholder" else _compute(node, both)
                if node.name in tapped:
                    if value.requires_grad:
                        value.retain_grad()
                    else:
                        value = value.detach().requires_grad_()
                    watched[node.name] = value
                values[node] = value
            losses, counts = next_token_loss(values[result], run.inputs[name], run.tokens.mask)
            (losses / counts.clamp_min(1)).sum().backward()  # type: ignore[no-untyped-call]
        for tap, accumulator in accumulators.items():
            value = watched.get(tap.node)
            if value is None:
                raise PlanError.of("tap_without_gradient", f"the loss does not depend on %{tap.node}")
            accumulator.add(run.tokens, value.detach(), value.grad)
        step()


def _check_finite(program: Program, tap: Tap, statistic: Statistic) -> None:
    for field in fields(statistic):
        value = getattr(statistic, field.name)
        if not bool(torch.isfinite(torch.as_tensor(value)).all()):
            path = program.nodes[tap.node].meta.get("path", "")
            raise PlanError.of(
                "not_finite",
                f"the {field.name} of %{tap.node} ({path}) is not finite",
                notes=("a weight or an activation before it is NaN or infinite, or overflows in the dtype of the run",),
                help=("check the checkpoint's weights, or calibrate in a wider dtype",),
            )
