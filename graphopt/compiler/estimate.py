"""Predicting a run: `memory_budget` before it starts, `estimate_run` once its steps are planned."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.compiler.memory import MAPPING, SLACK, WRITING, Budget, Workload, budget, peak_memory
from graphopt.compiler.resolve import Resolved
from graphopt.compiler.verify_sampled import read_by
from graphopt.cost import cost
from graphopt.diagnostics import GraphoptError, PlanError
from graphopt.ir.program import Program
from graphopt.ir.weights import sources
from graphopt.passkit import Context
from graphopt.views import Views

_PROBE = 64 << 20
_EVALUATION_BATCH = 8


@dataclass(frozen=True)
class Estimate:
    """What a run is predicted to need: peak memory of its process, bytes of tensors read and written, seconds.

    `stages` has the seconds of each stage; the rates behind them were measured for a moment on this machine.
    """

    peak_memory: int
    bytes_read: int
    bytes_written: int
    seconds: float
    stages: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def memory_budget(
    program: Program, resolved: Resolved, level: str, promised: int | None, out: str | Path | None, whole: bool = False
) -> Budget:
    """The limits of a run; its stages are counted when there is a promise to keep, or for `whole` figures.

    Raises PlanError when the promise cannot be kept.
    """
    directory = Path(out).absolute().parent if out is not None else None
    if promised is None and not whole:
        return budget(program, (), (), level, None, directory)
    trained = [spec.id for spec, config in resolved.steps if config.trains]
    if trained and promised is not None:
        raise PlanError.of(
            "memory_of_training",
            f"step {trained[0]} trains, and training holds all weights, so no amount of memory can be promised",
            help=("leave --memory out, or train in a run of its own",),
        )
    reads = [config.reads() for _, config in resolved.steps]
    return budget(program, _workloads(program, resolved), reads, level, promised, directory)


def _workloads(program: Program, resolved: Resolved) -> list[Workload]:
    spec, found = resolved.loaded.spec, []
    text = spec.calibration
    if text is not None:
        views = Views(program)
        context = Context(views, tuple(range(len(views.blocks))))
        taps: list[Any] = []
        for _, config in resolved.steps:
            try:
                taps.extend(config.observe(context))
            except GraphoptError:
                # The step itself will say it, with its place.
                continue
        if taps:
            found.append(Workload("observe", tuple(taps), text.batch, text.seq, -(-text.samples // text.batch)))
    measured = spec.evaluation
    if measured is not None:
        batches = -(-measured.samples // _EVALUATION_BATCH)
        found.append(Workload("evaluate", (), min(_EVALUATION_BATCH, measured.samples), measured.seq, batches))
    return found


def estimate_run(
    original: Program,
    steps: list[tuple[Program, Program]],
    resolved: Resolved,
    limits: Budget,
    captured: float,
    planned: float,
) -> Estimate:
    """Predict the run whose steps were just planned: `steps` has the programs before and after each.

    Reading, time and memory of planning are those of the planning that was done; the rest is counted.
    """
    result = steps[-1][1] if steps else original
    level = resolved.loaded.spec.verify.level
    planning = int(getattr(original.weights.source, "bytes_read", 0))
    checking = sum(_verified(before, after, level, limits) for before, after in steps)
    text = resolved.loaded.spec.evaluation
    evaluated = [original, *(after for _, after in steps)] if text is not None else []
    measuring = sum(_held(program) for program in evaluated)
    names = {name for weight in result.weights.weights.values() for name in sources(weight.expr)}
    saving = sum(_stored(original, name) for name in names)
    written = result.weights.bytes
    mapped = [w.expr for w in result.weights.weights.values() if w.expr.shape and w.expr.rows(0, 1) is None]
    largest = max((_elements(original, name) for expr in mapped for name in sources(expr)), default=0)
    copies = MAPPING[torch.float32] * largest
    verify = next((need.bytes for need in limits.needs if need.stage == "verify"), 0)
    if verify and limits.verify is not None:
        verify = max(verify, MAPPING[torch.float64] * largest)
    # Before the rates are measured, which takes memory that the run does not.
    peak = peak_memory()
    rates = _rates(original)
    flops = sum(_flops(before, after, level, limits) for before, after in steps)
    stages = {
        "capture": captured,
        "plan": planned,
        "verify": checking / rates["read"] + flops / rates["flops"] + checking / rates["widen"],
        "evaluate": sum(
            cost(program).at(B=text.samples, S=text.seq)["flops"] / (2 * rates["flops"]) for program in evaluated
        )
        if text is not None
        else 0.0,
        "find config": captured,
        "save": max(saving / rates["read"], written / rates["write"]) + copies / rates["widen"],
    }
    return Estimate(
        max(peak, limits.base + verify + SLACK, limits.base + WRITING + copies),
        planning + checking + measuring + saving,
        written,
        round(sum(stages.values()), 1),
        {name: round(seconds, 1) for name, seconds in stages.items()},
    )


def _held(program: Program) -> int:
    return sum(_stored(program, n) for w in program.weights.weights.values() for n in sources(w.expr))


def _elements(program: Program, name: str) -> int:
    return math.prod(program.weights[name].expr.shape) if name in program.weights else 0


def _stored(program: Program, name: str) -> int:
    return _elements(program, name) * int(program.weights[name].expr.dtype.itemsize) if name in program.weights else 0


def _verified(before: Program, after: Program, level: str, limits: Budget) -> int:
    if level in ("off", "shapes") or before.weights.source is None:
        return 0
    return sum(
        sum(_stored(program, source) for name in names for source in sources(program.weights[name].expr))
        for program, names in zip((before, after), read_by(before, after, limits.verify), strict=True)
    )


def _flops(before: Program, after: Program, level: str, limits: Budget) -> float:
    """Products of the verified part in float64, from its share of the weights."""
    if level in ("off", "shapes") or before.weights.source is None:
        return 0.0
    tokens = 15 if limits.verify is not None else 114
    return sum(
        2 * tokens * sum(math.prod(program.weights[name].expr.shape) for name in names)
        for program, names in zip((before, after), read_by(before, after, limits.verify), strict=True)
    )


def _rates(program: Program) -> dict[str, float]:
    """Bytes or operations a second, each measured for a fraction of a second."""
    block = torch.ones(_PROBE // 8, dtype=torch.float64)
    started = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(memoryview(block.numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())
        write = _PROBE / (time.perf_counter() - started)
    narrow = block[: _PROBE // 16].to(program.dtype)
    started = time.perf_counter()
    narrow.to(torch.float64)
    widen = narrow.nbytes / (time.perf_counter() - started)
    matrix = block[: 1 << 20].reshape(1024, 1024)
    matrix @ matrix
    started = time.perf_counter()
    matrix @ matrix
    flops = 2 * 1024**3 / (time.perf_counter() - started)
    return {"read": _read_rate(program), "write": write, "widen": widen, "flops": flops}


def _read_rate(program: Program) -> float:
    source: Any = program.weights.source
    largest = max(
        (w.expr for w in program.weights.weights.values() if w.kind != "constant"),
        key=lambda e: math.prod(e.shape),
    )
    started = time.perf_counter()
    value: torch.Tensor = source.get(sources(largest)[0])
    return float(value.nbytes) / max(time.perf_counter() - started, 1e-6)
