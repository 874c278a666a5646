"""Resolve a spec without a model: facts, order and what each step will need, refused in milliseconds when wrong."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.diagnostics import Diagnostic, PlanError, did_you_mean
from graphopt.passkit.base import Pass
from graphopt.passkit.facts import Fact
from graphopt.spec import LoadedSpec, StepSpec


@dataclass(frozen=True)
class Resolved:
    """A spec whose steps are known to be in a legal order."""

    loaded: LoadedSpec
    steps: tuple[tuple[StepSpec, Pass], ...]
    facts: frozenset[Fact]

    @property
    def calibrated(self) -> bool:
        """Whether any step watches the model run on calibration text."""
        return any(config.needs_calibration() for _, config in self.steps)


def resolve(loaded: LoadedSpec) -> Resolved:
    """Check facts and order of all steps; all that is wrong raises one PlanError.

    An illegal order names both places: the step that cannot run, and the step that made it so.
    """
    facts: dict[Fact, StepSpec | None] = {Fact.CAPTURED: None}
    dropped: dict[Fact, StepSpec] = {}
    problems: list[Diagnostic] = []
    steps: list[tuple[StepSpec, Pass]] = []
    for step in loaded.steps:
        config = step.config
        if not isinstance(config, Pass):
            raise TypeError(f"pass {step.use!r} is no graphopt.Pass")
        for fact in sorted(config.needs - facts.keys()):
            cause = dropped.get(fact)
            because = (f"because: {cause.id} ({cause.place}) ended it",) if cause else ()
            problems.append(
                Diagnostic(
                    "missing_fact",
                    f"{step.use} needs a program that is {fact}",
                    step.place,
                    because,
                    (f"put a step before it that makes the program {fact}",),
                )
            )
        for fact in sorted(config.forbids & facts.keys()):
            origin = facts[fact]
            because = (f"because: {origin.id} ({origin.place}) made it {fact}",) if origin else ()
            problems.append(
                Diagnostic(
                    "illegal_order",
                    f"{step.use} cannot run on a program that is {fact}",
                    step.place,
                    because,
                    (f"put {step.use} before {origin.use}",) if origin else (),
                )
            )
        if config.needs_calibration() and loaded.spec.calibration is None:
            problems.append(
                Diagnostic(
                    "no_calibration",
                    f"{step.use} watches the model run, but the spec has no calibration text",
                    step.place,
                    (),
                    ("add calibration: {data: FILE, samples: 64, seq: 256}",),
                )
            )
        earlier = [before.id for before, _ in steps]
        for name in config.refers_to():
            if name not in earlier:
                message = f"{step.use} refers to step {name!r}, which is not before it"
                problems.append(Diagnostic("unknown_step", message, step.place, (), did_you_mean(name, earlier)))
        for fact in config.adds:
            facts[fact] = step
        for fact in config.drops:
            facts.pop(fact, None)
            dropped[fact] = step
        steps.append((step, config))
    if not steps:
        problems.append(Diagnostic("no_steps", "the spec has no steps", loaded.place_of("steps")))
    perplexity = loaded.spec.checks.perplexity
    if perplexity is not None and loaded.spec.evaluation is None:
        problems.append(
            Diagnostic(
                "no_evaluation",
                "a perplexity check needs evaluation text",
                loaded.place_of("checks", "perplexity"),
                (),
                ("add evaluation: {data: FILE, samples: 64, seq: 256}",),
            )
        )
    if problems:
        raise PlanError(problems[0], *problems[1:])
    return Resolved(loaded, tuple(steps), frozenset(facts))
