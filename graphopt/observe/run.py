"""Observation in one streaming pass: calibration text goes through a program block by block, weights come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError, did_you_mean
from graphopt.ir.program import Program
from graphopt.ir.reach import ancestors
from graphopt.ir.run import bind_inputs, runnable
from graphopt.observe.accumulate import ACCUMULATORS, Accumulator, Tokens
from graphopt.observe.distributed import gathered, mine, world
from graphopt.observe.stream import Layered, Limits, Visit, compute, cut, stream
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
    limits: Limits | None = None,
) -> Statistics:
    """Collect statistics of nodes over batches of inputs by name (`input_ids` `[B, S]`, padding, ...).

    One pass: the weights of one block are evaluated at a time and all batches run through it, so that memory is one
    block plus the live values of the batches; `limits` makes both smaller, and the statistics keep their bits. Under
    torch.distributed each process runs its share of the batches and all get the statistics of the whole. Padded tokens
    do not count. `taylor` taps instead run the whole program with gradients, one batch at a time, with all weights and
    that batch's activations in memory. `progress(done, total)` is told after each batch of each segment. Raises
    PlanError for an unknown node, no text, a NaN or infinity.
    """
    wanted = tuple(dict.fromkeys(taps))
    if not wanted:
        return Statistics({})
    every = list(batches)
    if not every:
        raise PlanError.of(
            "no_calibration", "there is no calibration text to observe", help=("add calibration: {data: FILE, ...}",)
        )
    _check_nodes(program, wanted)
    share = mine(len(every))
    runs = [_bound(program, every[i], device) for i in share]
    limits = limits or Limits()
    watched = {tap: _Watch(ACCUMULATORS[tap.kind](tap), runs, share) for tap in wanted}
    graph = runnable(program, dtype, device)
    visits = [watch.visit(tap) for tap, watch in watched.items() if tap.kind != "taylor"]
    graded = {tap: watch for tap, watch in watched.items() if tap.kind == "taylor"}
    segments = cut(program, graph, visits, dtype=dtype, views=views, limits=limits) if visits else []
    step = _Counter(progress, len(runs) * (len(segments) + bool(graded)))
    with torch.no_grad():
        inputs = [run.inputs for run in runs]
        stream(program, segments, inputs, dtype=dtype, device=device, limits=limits, step=step)
    if graded:
        _differentiate(program, graph, runs, graded, dtype, device, step)
        for watch in graded.values():
            watch.gather()
    found = {tap: watch.accumulator.result() for tap, watch in watched.items()}
    for tap, statistic in found.items():
        _check_finite(program, tap, statistic)
    return Statistics(found)


class _Watch:
    """One tap's accumulator, fed with this process's batches and merged with the others' in the order of the batches."""

    def __init__(self, accumulator: Accumulator, runs: Sequence[_Run], share: Sequence[int]) -> None:
        self.accumulator, self.runs, self.share = accumulator, runs, share
        self.alone = world() == 1
        self.waiting: list[tuple[int, Any]] = []

    def visit(self, tap: Tap) -> Visit:
        """What the stream calls."""
        nodes = (tap.node,) if tap.other is None else (tap.node, tap.other)
        return Visit(nodes, lambda batch, values: self.add(batch, *values), self.gather)

    def add(self, batch: int, value: torch.Tensor, other: torch.Tensor | None = None) -> None:
        """Take one batch's value."""
        state = self.accumulator.partial(self.runs[batch].tokens, value, other)
        if self.alone or not self.accumulator.replayed:
            self.accumulator.merge(state)
        else:
            self.waiting.append((self.share[batch], state))

    def gather(self) -> None:
        """Merge with what the other processes found."""
        if self.alone:
            return
        if self.accumulator.replayed:
            found = [each for part in gathered(self.waiting) for each in part]
            self.waiting = []
            states = [state for _, state in sorted(found, key=lambda each: each[0])]
        else:
            states = gathered(self.accumulator.state())
            self.accumulator = type(self.accumulator)(self.accumulator.tap)
        for state in states:
            self.accumulator.merge(state)


@dataclass(frozen=True)
class _Run:
    """One batch: graph inputs by placeholder name, and which tokens count."""

    inputs: dict[str, torch.Tensor]
    tokens: Tokens
    raw: Batch


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
        pairs = tap.kind in ("cosine", "routing", "activity")
        if tap.kind != "grouped" and pairs != (tap.other is not None):
            raise PlanError.of("tap_other", f"a {tap.kind} tap on %{tap.node} with other={tap.other!r}")


def _evaluate(
    program: Program, nodes: Iterable[fx.Node], dtype: torch.dtype, device: torch.device | str
) -> dict[fx.Node, Any]:
    return {node: program.weights.evaluate(node.meta["weight"], dtype, device) for node in nodes}


def _differentiate(
    program: Program,
    graph: fx.GraphModule,
    runs: list[_Run],
    watched: Mapping[Tap, _Watch],
    dtype: torch.dtype,
    device: torch.device | str,
    step: _Counter,
) -> None:
    """Each sample's own mean next-token loss is differentiated, so that terms do not depend on the batching."""
    order = [node for node in graph.graph.nodes if node.op != "output"]
    result = order[[node.name for node in order].index(program.output_nodes[0].name)]
    needed = ancestors([result])
    tapped = {tap.node for tap in watched}
    if not runs:
        return
    weights = _evaluate(program, [node for node in order if "weight" in node.meta and node in needed], dtype, device)
    name = token_input(program)
    for batch, run in enumerate(runs):
        values: dict[fx.Node, Any] = {}
        seen: dict[str, torch.Tensor] = {}
        both = Layered(weights, values)
        with torch.enable_grad():
            for node in order:
                if "weight" in node.meta or node not in needed:
                    continue
                value = run.inputs[node.name] if node.op == "placeholder" else compute(node, both)
                if node.name in tapped:
                    if value.requires_grad:
                        value.retain_grad()
                    else:
                        value = value.detach().requires_grad_()
                    seen[node.name] = value
                values[node] = value
            losses, counts = next_token_loss(values[result], run.inputs[name], run.tokens.mask)
            (losses / counts.clamp_min(1)).sum().backward()  # type: ignore[no-untyped-call]
        for tap, watch in watched.items():
            value = seen.get(tap.node)
            if value is None:
                raise PlanError.of("tap_without_gradient", f"the loss does not depend on %{tap.node}")
            watch.add(batch, value.detach(), value.grad)
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
