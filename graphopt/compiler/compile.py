"""compile: a model and a spec in, a transformed Program out. Read this file first; data flows from top to bottom.

spec.yaml -> load_spec -> resolve (facts and order; no model yet)
model     -> capture   -> Program
per step:  views -> observe? -> plan -> edits and declines -> apply -> verify -> train? -> cost -> trail
checks, then save
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from graphopt.artifact import load, save
from graphopt.compiler.estimate import Estimate, estimate_run, memory_budget
from graphopt.compiler.memory import Budget
from graphopt.compiler.resolve import Resolved, resolve
from graphopt.compiler.text import batches, evaluate, training_data
from graphopt.compiler.verify import verify as verify_step
from graphopt.compiler.verify_drafting import verify_drafting
from graphopt.cost import cost
from graphopt.diagnostics import CheckError, Diagnostic, GraphoptError, Place, PlanError
from graphopt.ir.pictures import PICTURES
from graphopt.ir.program import Applied, Input, Program
from graphopt.ir.text import fingerprint
from graphopt.observe import Statistics
from graphopt.observe.distributed import rank, together
from graphopt.observe.run import observe
from graphopt.passkit import Context, Pass, PassRegistry
from graphopt.passkit.edits import Plan, apply_edits
from graphopt.passkit.speculation import Speculation
from graphopt.spec import LoadedSpec, ScalarError, StepSpec, load_spec, select_paths, write_lock
from graphopt.train import Record, train
from graphopt.views import Views

REPORT_AT = {"B": 1, "S": 512}
PICTURES_AT = 1


class Progress(Protocol):
    """What a caller shows while it waits."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins, with so many units of work."""

    def advance(self, n: int = 1) -> None:
        """Units of work are done."""

    def done(self) -> None:
        """The stage ends."""


class _Silent:
    def stage(self, name: str, total: int | None) -> None:
        pass

    def advance(self, n: int = 1) -> None:
        pass

    def done(self) -> None:
        pass


@dataclass(frozen=True)
class Step:
    """One step after its surgery: what it was, what it decided, and the programs around it."""

    spec: StepSpec
    config: Pass
    plan: Plan
    before: Program
    after: Program


def compile(
    model: Any,
    spec: str | Path | LoadedSpec,
    *,
    overrides: tuple[str, ...] | list[str] = (),
    out: str | Path | None = None,
    verify: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    state: str | Path | None = None,
    memory: int | None = None,
) -> Program:
    """Transform `model` (a checkpoint directory, a module or a Program) as `spec` says; save to `out` when given.

    Steps that train keep their state in the directory `state` and go on from there when they are run again. `memory`
    is what the process may use in bytes, and the run keeps to it or is refused before it starts. Under
    torch.distributed every process calls this, they share the text, and the first one saves. Raises
    SpecError, PlanError, VerifyError or CheckError with the place in the spec; nothing is written to `out` then.
    """
    progress = progress or _Silent()
    resolved = resolve(_loaded(spec, overrides))
    spec_values = resolved.loaded.spec
    progress.stage("capture", None)
    program = capture(model if model is not None else _model_of(resolved.loaded))
    progress.done()
    level = verify or spec_values.verify.level
    limits = memory_budget(program, resolved, level, memory, out)
    quality = _measure(program, resolved, progress, limits)
    original, first, trail = program, quality, list(program.trail)
    programs = {"original": program}
    for spec_step, config in resolved.steps:
        started = time.perf_counter()
        step = _step(program, spec_step, config, resolved, progress, limits)
        limits.check()
        progress.stage(f"verify {step.spec.id}", None)
        certificate = verify_step(
            step.before, step.after, step.plan, step.config.effect, level, step.spec.place, step.spec.id, limits.verify
        )
        for edit in step.plan.edits:
            if isinstance(edit, Speculation) and certificate["level"] == "full":
                certificate["decoding"] = verify_drafting(step.after, edit.drafting, step.spec.place, step.spec.id)
        progress.done()
        limits.check()
        program, record = _train(step, programs, resolved, progress, state)
        programs[step.spec.id] = program
        if record is not None:
            certificate["training"] = record.to_json()
        before = _figures(step.before, quality)
        quality = _measure(program, resolved, progress, limits)
        trail.append(
            Applied(
                step=step.spec.id,
                options=step.config.to_yaml(),
                effect=str(step.config.effect),
                edits=tuple(edit.to_json() for edit in step.plan.edits),
                declines=tuple(decline.to_json() for decline in step.plan.declines),
                certificate={**certificate, **({"notes": dict(step.plan.notes)} if step.plan.notes else {})},
                before=before,
                after=_figures(program, quality),
                place=str(step.spec.place),
                seconds=round(time.perf_counter() - started, 3),
            )
        )
    program = replace(program, trail=tuple(trail))
    _check(resolved, original, program, first, quality)
    limits.check()
    if out is not None and rank() == 0:
        progress.stage("save", None)
        saving = spec_values.save
        dtype = getattr(torch, saving.dtype) if saving.dtype else None
        extra: dict[str, Any] = {} if saving.shard_size is None else {"shard_size": int(saving.shard_size)}
        facts = {"before": fingerprint(original), "after": fingerprint(program)}
        save(
            program,
            out,
            format=saving.format,
            dtype=dtype,
            overwrite=overwrite,
            also=lambda directory: write_lock(directory / "spec.lock.yaml", resolved.loaded, facts),
            **extra,
        )
        progress.done()
        limits.check()
    together()
    return program


def plan_steps(model: Any, loaded: LoadedSpec, progress: Progress | None = None) -> list[tuple[StepSpec, Plan]]:
    """Plan every step, each on the result of the ones before; writes, verifies and trains nothing."""
    return plan_and_estimate(model, loaded, progress, estimate=False)[0]


def plan_and_estimate(
    model: Any, loaded: LoadedSpec, progress: Progress | None = None, memory: int | None = None, estimate: bool = True
) -> tuple[list[tuple[StepSpec, Plan]], Estimate | None]:
    """The plans of all steps, and what the run with them would need within `memory` bytes."""
    resolved = resolve(loaded)
    started = time.perf_counter()
    program = capture(model if model is not None else _model_of(loaded))
    captured = time.perf_counter() - started
    limits = memory_budget(program, resolved, loaded.spec.verify.level, memory, None, whole=estimate)
    plans, programs = [], [program]
    for spec, config in resolved.steps:
        step = _step(program, spec, config, resolved, progress or _Silent(), limits)
        plans.append((spec, step.plan))
        program = step.after
        programs.append(program)
    if not estimate:
        return plans, None
    seconds = time.perf_counter() - started - captured
    return plans, estimate_run(programs[0], list(pairwise(programs)), resolved, limits, captured, seconds)


def capture(model: Any, *, inputs: tuple[Input, ...] | None = None, **options: Any) -> Program:
    """A Program of a checkpoint directory (stock or graphopt), a transformers model, any module (with `inputs`), or a Program.

    Raises ArtifactError when files are wrong, CaptureError when the model cannot be captured.
    """
    from graphopt.frontend import capture_model, capture_module

    if isinstance(model, Program):
        return model
    if isinstance(model, torch.nn.Module):
        return capture_module(model, inputs, **options) if inputs is not None else capture_model(model, **options)
    return load(model, **options)


def _step(
    program: Program, spec: StepSpec, config: Pass, resolved: Resolved, progress: Progress, limits: Budget
) -> Step:
    """Plan one step and apply its edits."""
    try:
        views = Views(program)
        context = _context(views, spec, resolved)
        taps = config.observe(context)
        if taps:
            statistics = _observe(program, taps, resolved, spec, progress, limits)
            context = Context(context.views, context.layers, statistics, context.seed, context.paths, context.facts)
        plan = config.plan(context)
        if not plan.edits and not spec.optional:
            raise PlanError.of(
                "nothing_to_do",
                f"{spec.use} found nothing to change",
                notes=tuple(f"{decline.candidate}: {decline.reason}" for decline in plan.declines[:8]),
                help=("change the options, or say `optional: true`",),
            )
        after = apply_edits(program, views, plan.edits, spec.id) if plan.edits else program
    except ScalarError as error:
        raise error.at(spec.place) from error
    except GraphoptError as error:
        raise _placed(error, spec.place) from error
    return Step(spec, config, plan, program, after)


def _train(
    step: Step, programs: Mapping[str, Program], resolved: Resolved, progress: Progress, state: str | Path | None
) -> tuple[Program, Record | None]:
    """The step's program with its weights trained as its plan asks; `programs` are those that may teach it."""
    training, text = step.plan.training, resolved.loaded.spec.calibration
    if training is None:
        return step.after, None
    try:
        if text is None:
            raise PlanError.of("no_calibration", f"{step.spec.use} trains, but the spec has no calibration text")
        teachers = {**programs, "before": step.before}
        teacher = teachers[training.teacher] if training.teacher is not None else None
        progress.stage(f"train {step.spec.id}", training.recipe.steps)
        found = train(
            step.after,
            training,
            training_data(step.after, text.data),
            teacher,
            state=Path(state) / step.spec.id if state is not None else None,
            tell=progress.advance,
        )
        progress.done()
    except GraphoptError as error:
        raise _placed(error, step.spec.place) from error
    return found


def _context(views: Views, step: StepSpec, resolved: Resolved) -> Context:
    total = len(views.blocks)
    layers: tuple[int, ...] = tuple(range(total))
    paths: tuple[str, ...] = ()
    if step.where is not None:
        try:
            layers = step.where.layers.resolve(total)
        except ScalarError as error:
            raise error.at(step.place_of("where", "layers")) from error
        if step.where.paths:
            known = [block.path for block in views.blocks]
            known += [a.path for a in views.attentions] + [f.path for f in views.feed_forwards]
            known += [bank.path for bank in views.experts]
            try:
                paths = select_paths(step.where.paths, known)
            except ScalarError as error:
                raise error.at(step.place_of("where", "paths")) from error
    return Context(views, layers, seed=resolved.loaded.spec.seed or 0, paths=paths)


def _observe(
    program: Program, taps: Any, resolved: Resolved, step: StepSpec, progress: Progress, limits: Budget
) -> Statistics:
    text = resolved.loaded.spec.calibration
    if text is None:
        raise PlanError.of("no_calibration", f"{step.use} watches the model run, but the spec has no calibration text")
    made = batches(program, text.data, text.samples, text.seq, text.batch, text.seed)
    seen = 0

    def tell(done: int, total: int) -> None:
        nonlocal seen
        if seen == 0:
            progress.stage(f"observe for {step.id}", total)
        progress.advance(done - seen)
        seen = done

    found = observe(program, taps, made, progress=tell, limits=limits.observe)
    progress.done()
    return found


def _measure(program: Program, resolved: Resolved, progress: Progress, limits: Budget) -> dict[str, Any]:
    text = resolved.loaded.spec.evaluation
    if text is None:
        return {}
    progress.stage("evaluate", text.samples)
    found = evaluate(program, text.data, text.samples, text.seq, tell=progress.advance, limits=limits.evaluate)
    progress.done()
    return {"perplexity": found["perplexity"], "nats_per_token": found["nats_per_token"], "tokens": found["tokens"]}


def _figures(program: Program, quality: dict[str, Any]) -> dict[str, Any]:
    at = {**{dim.name: REPORT_AT["S"] for dim in program.dims}, **REPORT_AT}
    if PICTURES.name in at:
        at[PICTURES.name] = PICTURES_AT
    return {**cost(program).at(**at), "at": at, **quality}


def _check(
    resolved: Resolved, original: Program, result: Program, before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Raise CheckError with every bound that the result misses."""
    checks = resolved.loaded.spec.checks
    old, new = _figures(original, before), _figures(result, after)
    missed: list[Diagnostic] = []

    def miss(place: Place, what: str, value: float, bound: float) -> None:
        missed.append(Diagnostic("check_missed", f"{what} is {value:,.6g}, but must be at most {bound:,.6g}", place))

    for name in ("parameters", "flops", "kv_bytes", "bytes"):
        limit = getattr(checks, name)
        if limit is not None and new[name] > limit.bound(old[name]):
            miss(resolved.loaded.place_of("checks", name), name, new[name], float(limit.bound(old[name])))
    quality = checks.perplexity
    if quality is not None:
        place = resolved.loaded.place_of("checks", "perplexity")
        if quality.increase is not None:
            bound = old["perplexity"] * (1 + float(quality.increase.limit))
            if new["perplexity"] > bound:
                miss(place, "perplexity", new["perplexity"], bound)
        if quality.value is not None and new["perplexity"] > float(quality.value.limit):
            miss(place, "perplexity", new["perplexity"], float(quality.value.limit))
    if missed:
        raise CheckError(missed[0], *missed[1:])


def _placed(error: GraphoptError, place: Place) -> GraphoptError:
    """The same error at the step's place, where it has none of its own."""
    diagnostics = [d if d.place is not None else d.at(place) for d in error.diagnostics]
    return type(error)(diagnostics[0], *diagnostics[1:])


def _loaded(spec: str | Path | LoadedSpec, overrides: tuple[str, ...] | list[str]) -> LoadedSpec:
    if isinstance(spec, LoadedSpec):
        return spec
    return load_spec(spec, list(overrides), registry=PassRegistry())


def _model_of(loaded: LoadedSpec) -> str:
    model = loaded.spec.model
    if model is None:
        raise PlanError.of(
            "no_model",
            "neither the spec nor the caller names a model",
            loaded.place_of(),
            help=("add model: PATH to the spec, or pass --model PATH",),
        )
    return model
