"""What a run needs, before it starts: peak memory by stage, and the limits under which it keeps a promise about it.

Everything is counted from the program's shapes on top of what the process holds once the model is captured. A step is
counted on the original model: steps make models smaller.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.compiler.verify import vocabulary_of
from graphopt.cost.count import dimension_names
from graphopt.cost.flops import sizes_of
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.reach import ancestors
from graphopt.ir.run import runnable
from graphopt.observe import Tap
from graphopt.observe.stream import PIECE, Limits, Segment, Visit, cut
from graphopt.views import Views

aten = torch.ops.aten
# What threads, allocators and kernels loaded late take beyond the tensors that are counted.
SLACK = 96 << 20
# Bytes in work while a tensor is written by rows: queued, being hashed, read and computed.
WRITING = 160 << 20
# Bytes in work while weights are scored by rows.
SCORING = 16 << 20
# Bytes an element while a map of a whole weight is computed: stored, widened, gathered and laid out for the product.
MAPPING = {torch.float32: 14, torch.float64: 26}
_ALIASES = {aten.to, aten.reshape, aten._unsafe_view, aten.contiguous, aten.alias}
_OBSERVED = torch.float32


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs on top of the captured model; `least` with all that can be spilled or cut small."""

    stage: str
    bytes: int
    least: int


@dataclass(frozen=True)
class Workload:
    """One pass over text: what is tapped, and the shape and number of batches."""

    stage: str
    taps: tuple[Tap, ...]
    batch: int
    seq: int
    batches: int


@dataclass(frozen=True)
class Budget:
    """The stages' needs and the limits that follow; `peak` is predicted for the run with those limits."""

    base: int
    needs: tuple[Need, ...]
    promised: int | None
    observe: Limits | None
    evaluate: Limits | None
    verify: Limits | None

    @property
    def peak(self) -> int:
        """Predicted peak memory of the process."""
        return max([self.base, *(self.base + self._used(need) + SLACK for need in self.needs)])

    def _used(self, need: Need) -> int:
        if self.promised is None:
            return need.bytes
        return min(need.bytes, max(need.least, self.promised - self.base - SLACK))

    def check(self) -> None:
        """Raise PlanError when the promise was not kept; called between stages, so that it is never broken silently."""
        if self.promised is not None and peak_memory() > self.promised:
            raise PlanError.of(
                "memory_exceeded",
                f"the run has used {peak_memory():,} bytes, more than the {self.promised:,} that were promised",
                help=("allow more memory; the estimate of this run was wrong, please report it",),
            )


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident memory of this process now; its peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory()


def available() -> int | None:
    """Memory that this machine can still give, where it says."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def budget(
    program: Program,
    workloads: Sequence[Workload],
    reads: Sequence[str],
    level: str,
    promised: int | None,
    directory: Path | None,
) -> Budget:
    """Count the stages of a run and choose its limits.

    `reads` says for each step what planning reads of weights: `none`, some `rows` at a time, or `whole` ones. Raises
    PlanError, with what would be needed, when the run cannot keep within `promised` bytes.
    """
    base = resident()
    room = None if promised is None else promised - base - SLACK
    needs, limits = [], {}
    for work in workloads:
        need, found = _workload(program, work, room, directory)
        needs.append(need)
        limits[work.stage] = found
    needs += [_planning(program, kind) for kind in dict.fromkeys(reads)]
    verify, checking = _verifying(program, level, room)
    needs += [*([verify] if verify is not None else []), _saving(program, reads)]
    if verify is not None and checking is not None and "whole" in reads:
        # Which weights a step will map is not known yet: at worst the largest.
        mapping = verify.bytes + MAPPING[torch.float64] * _largest(program)
        needs.append(Need("verify mapped weights", mapping, mapping))
    made = Budget(base, tuple(needs), promised, limits.get("observe"), limits.get("evaluate"), checking)
    least = base + max(need.least for need in needs) + SLACK
    if promised is not None and least > promised:
        worst = max(needs, key=lambda need: need.least)
        raise PlanError.of(
            "memory_too_small",
            f"this run needs {_size(least)}, more than the {_size(promised)} that --memory allows",
            notes=(
                f"the captured model and its libraries take {_size(base)}",
                f"to {worst.stage}, at least {_size(worst.least)} come on top",
            ),
            help=(f"allow --memory {-(-least // (64 << 20)) * 64}MiB",),
        )
    return made


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"


def _workload(program: Program, work: Workload, room: int | None, directory: Path | None) -> tuple[Need, Limits | None]:
    streamed = [tap for tap in work.taps if tap.kind != "taylor"]
    graph = runnable(program, _OBSERVED, "cpu")
    sizes = {"B": work.batch, "S": work.seq}
    number = _Sizer(program, sizes)
    tokens = work.batch * work.seq
    whole = least = 0
    limits = None
    if streamed or work.stage == "evaluate":
        if work.stage == "evaluate":
            visits = [Visit((program.output_nodes[0].name,), lambda *_: None)]
            width = int(program.output_nodes[0].meta["val"].shape[-1])
            extra = work.seq * width * 3 * 8
        else:
            visits = [Visit((t.node,) if t.other is None else (t.node, t.other), lambda *_: None) for t in streamed]
            extra = sum(_kept(program, tap, number) for tap in streamed)
            extra += max(_passing(program, tap, number, tokens) for tap in streamed)
        views = Views(program)

        def measure(limits: Limits) -> tuple[int, int, int]:
            segments = cut(program, graph, visits, dtype=_OBSERVED, views=views, limits=limits)
            carried, working = _activations(segments, number)
            return max(_weights(program, segment) for segment in segments), carried, working

        weights, carried, working = measure(Limits())
        whole = weights + carried * work.batches + working + extra
        small, _, working_small = measure(Limits(weights=1))
        least = small + max(working, working_small) + extra
        if room is not None:
            limits = Limits(None, None, directory)
            if whole > room:
                left = room - working - extra
                bound = None if weights <= left else 1
                left -= weights if bound is None else small
                limits = Limits(bound, max(0, left), directory)
    if any(tap.kind == "taylor" for tap in work.taps):
        every = sum(_held(program, name) for name in program.weights) + 2 * number.total(graph)
        whole, least = max(whole, every), max(least, every)
    return Need(work.stage, whole, least), limits


class _Sizer:
    """Bytes of nodes at given sizes, in the dtype of the run; views of another node have none of their own."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program = program
        names = {old: str(new) for old, new in dimension_names(program).items()}
        self.sizes = {old: sizes.get(name, 2) for old, name in names.items()}
        self.number = cache(self._number)

    def _number(self, size: sympy.Expr) -> int:
        return int(size.subs({symbol: self.sizes.get(symbol, 2) for symbol in size.free_symbols}))

    def elements(self, value: Any) -> int:
        total = 1
        for size in sizes_of(value):
            total *= size if isinstance(size, int) else self.number(size)
        return total

    def bytes(self, node: fx.Node) -> int:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or self.alias(node) is not None:
            return 0
        own = _OBSERVED if value.dtype.is_floating_point else value.dtype
        return self.elements(value) * int(own.itemsize)

    def alias(self, node: fx.Node) -> fx.Node | None:
        """The node whose storage a node shares."""
        target = node.target
        packet = getattr(target, "overloadpacket", None)
        views = isinstance(target, torch._ops.OpOverload) and (target.is_view or packet in _ALIASES)
        first = node.args[0] if views and node.args else None
        if isinstance(first, fx.Node) and packet is aten.to:
            kept, made = first.meta["val"].dtype, node.meta["val"].dtype
            return first if kept.is_floating_point == made.is_floating_point else None
        return first if isinstance(first, fx.Node) else None

    def total(self, graph: fx.GraphModule) -> int:
        return sum(self.bytes(node) for node in graph.graph.nodes if node.op == "call_function")


def _activations(segments: Iterable[Segment], number: _Sizer) -> tuple[int, int]:
    """Of one batch: the most bytes between two segments, and the most at any time."""
    own: dict[fx.Node, int] = {}
    users: dict[fx.Node, int] = {}
    root: dict[fx.Node, fx.Node] = {}
    alive = carried = working = 0
    for segment in segments:
        for node in segment.nodes:
            base = number.alias(node)
            root[node] = root.get(base, base) if base is not None else node
            users[root[node]] = users.get(root[node], 0) + 1
            own[node] = number.bytes(node)
            alive += own[node]
            # Norms and activations make copies of their result's size before they have it.
            working = max(working, alive + 2 * own[node])
            for gone in segment.dead.get(node, ()):
                holder = root.get(gone, gone)
                users[holder] = users.get(holder, 1) - 1
                if users[holder] == 0:
                    alive -= own.get(holder, 0)
        carried = max(carried, alive)
    return carried, working


def _held(program: Program, name: str, dtype: torch.dtype = _OBSERVED) -> int:
    expr = program.weights[name].expr
    kind = dtype if expr.dtype.is_floating_point else expr.dtype
    return math.prod(expr.shape) * int(kind.itemsize)


def _weights(program: Program, segment: Segment, dtype: torch.dtype = _OBSERVED) -> int:
    """Bytes of a segment's weights and of the largest one as it is stored, which is read before it widens.

    Of a weight that is read by rows, two pieces (one is computed while the last is still held) and the stored rows.
    """
    names = [node.meta["weight"] for node in segment.weights]
    if segment.rows:
        stored = max(int(program.weights[name].expr.dtype.itemsize) for name in names)
        return 2 * PIECE + PIECE * stored // int(dtype.itemsize)
    narrow = [_held(program, name, program.weights[name].expr.dtype) for name in names]
    return sum(_held(program, name, dtype) for name in names) + max(narrow, default=0)


def _kept(program: Program, tap: Tap, number: _Sizer) -> int:
    width = _width(program, tap, number)
    if tap.kind == "activity":
        return _products(program, tap, number)
    if tap.kind == "grouped":
        # By token the groups are as many as the vocabulary has entries at most, by sample few.
        return width * 8 * (1 if tap.other is None else vocabulary_of(program))
    return width * 8 * (width if tap.kind == "gram" else 6 if tap.kind == "moments" else 1)


def _products(program: Program, tap: Tap, number: _Sizer) -> int:
    """Bytes of the products of two nodes' features, each with itself and with the other."""
    width, other = _width(program, tap, number), _width(program, Tap(str(tap.other), "moments"), number)
    return 8 * (width * width + width * other + other * other)


def _passing(program: Program, tap: Tap, number: _Sizer, tokens: int) -> int:
    """Copies in float64 that a tap makes of one batch's value."""
    width = _width(program, tap, number)
    held = _products(program, tap, number) if tap.kind == "activity" else 0
    return 3 * 8 * tokens * width + (width * width * 8 if tap.kind == "gram" else held)


def _width(program: Program, tap: Tap, number: _Sizer) -> int:
    value = program.nodes[tap.node].meta["val"]
    sizes = [size if isinstance(size, int) else number.number(size) for size in sizes_of(value)]
    return sizes[1] * sizes[3] if tap.layout == "heads" and len(sizes) == 4 else sizes[-1]


def _largest(program: Program) -> int:
    """Elements of the largest weight of a block."""
    inside = {
        source.meta["weight"]
        for block in Views(program).blocks
        for node in ancestors(block.nodes)
        for source in node.all_input_nodes
        if "weight" in source.meta and node in block.nodes
    }
    names = inside or set(program.weights)
    return max(math.prod(program.weights[name].expr.shape) for name in names)


def _planning(program: Program, reads: str) -> Need:
    if reads == "whole":
        # A weight in its own dtype and float64, and what is computed from it.
        need = _largest(program) * (program.dtype.itemsize + 3 * 8)
    else:
        need = SCORING if reads == "rows" else 0
    return Need("plan", need, need)


def _verifying(program: Program, level: str, room: int | None) -> tuple[Need | None, Limits | None]:
    if level in ("off", "shapes") or program.weights.source is None:
        return None, None
    double = sum(_held(program, name, torch.float64) for name in program.weights)
    native = max(_held(program, name, program.weights[name].expr.dtype) for name in program.weights)
    whole = 2 * double + native
    free = available()
    fits = whole <= room if room is not None else free is None or whole <= free * 6 // 10
    if fits:
        return Need("verify", whole, whole), None
    graph = runnable(program, torch.float64, "cpu")
    visit = Visit(tuple(node.name for node in program.output_nodes), lambda *_: None)
    limits = Limits(PIECE, None, None, split=True)
    segments = cut(program, graph, [visit], dtype=torch.float64, limits=limits)
    need = max(_weights(program, segment, torch.float64) for segment in segments)
    return Need("verify", need, need), limits


def _saving(program: Program, reads: Sequence[str]) -> Need:
    """What is queued, pieces in work, and copies of whole weights: in float32 where a step maps them, and of the cut
    columns where a bias compensates for them."""
    copies = 16 if "whole" in reads else 6 if "rows" in reads else 0
    need = WRITING + copies * _largest(program)
    return Need("save", need, need)
