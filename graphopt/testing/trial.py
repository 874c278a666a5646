"""One pass on one program: its plan and its result, made once and shared by all laws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from graphopt.compiler import verify
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.observe import observe
from graphopt.passkit import Context, Pass, Plan
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.spec import ScalarError
from graphopt.views import Views

CALIBRATION = ({"B": 2, "S": 9, "T": 4}, {"B": 1, "S": 5, "T": 3})
# Batch 1 and length 1 among them, and none of the sizes is the one that was captured.
SHAPES = ({"B": 1, "S": 1, "T": 1}, {"B": 2, "S": 6, "T": 4}, {"B": 4, "S": 23, "T": 9})


class LawBroken(AssertionError):
    """A pass does not keep a law: `law` is its name."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(law, message)
        self.law = law
        self.message = message

    def __str__(self) -> str:
        return f"{self.law}: {self.message}"


class Refused(Exception):
    """A pass refuses a program or an option with a message, which is no fault and proves nothing either."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A configuration on a program; calibration is random tokens, drawn from `seed`."""

    config: Pass
    program: Program
    seed: int = 0

    @cached_property
    def views(self) -> Views:
        """Views of the program before."""
        return Views(self.program)

    @cached_property
    def context(self) -> Context:
        """What the plan looks at: all layers, statistics where the pass asks for them."""
        return self.context_of(self.views)

    def context_of(self, views: Views) -> Context:
        """A context over given views; raises Refused when the pass refuses to observe."""
        plain = Context(views, tuple(range(len(views.blocks))), seed=self.seed)
        try:
            taps = self.config.observe(plain)
            if not taps:
                return plain
            batches = [verify.random_inputs(views.program, sizes, self.seed + i) for i, sizes in enumerate(CALIBRATION)]
            return replace(plain, statistics=observe(views.program, taps, batches, dtype=torch.float64))
        except (PlanError, ScalarError) as error:
            raise Refused(_message(error)) from error

    def plan_on(self, context: Context) -> Plan:
        """A fresh plan; raises Refused when the pass refuses with a message."""
        try:
            return self.config.plan(context)
        except (PlanError, ScalarError) as error:
            raise Refused(_message(error)) from error

    @cached_property
    def plan(self) -> Plan:
        """The plan."""
        return self.plan_on(self.context)

    @cached_property
    def after(self) -> Program:
        """The program after the edits."""
        if not self.plan.edits:
            return self.program
        return apply_edits(self.program, self.views, self.plan.edits, self.config.name)

    @cached_property
    def emulated(self) -> Program:
        """The program with the same change made without surgery."""
        return emulate_edits(self.program, self.views, self.plan.edits)


def trial(config: Pass, program: Program) -> Trial:
    """The trial of a configuration on a program, the last ones remembered."""
    return _remembered(_Same(config), _Same(program))


def given(program: Program, sizes: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Random inputs in the dtypes that a program declares, for runs in its own."""
    kinds = {spec.name: spec.dtype for spec in program.entry.inputs}
    drawn = verify.random_inputs(program, sizes, seed)
    return {name: value.to(kinds[name]) if value.is_floating_point() else value for name, value in drawn.items()}


class _Same:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@lru_cache(maxsize=4)
def _remembered(config: _Same, program: _Same) -> Trial:
    assert isinstance(config.value, Pass)
    assert isinstance(program.value, Program)
    return Trial(config.value, program.value)


def _message(error: PlanError | ScalarError) -> str:
    message = error.diagnostics[0].message
    if not message.strip():
        raise LawBroken("plan_is_complete", f"{type(error).__name__} without a message") from error
    return message
