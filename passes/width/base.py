"""What the width passes share as configuration; no torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from graphopt.passkit import Context, Fact, Pass
from graphopt.select.options import (
    Account,
    Amount,
    Compensate,
    Explicit,
    Fluctuation,
    Global,
    Magnitude,
    PerLayer,
    Score,
    Uniform,
    check_keep,
)
from graphopt.spec import ScalarError

if TYPE_CHECKING:
    from graphopt.observe import Tap
    from graphopt.passkit.edits import Plan


class WidthPass(Pass):
    """A pass that scores units, allocates a budget and cuts; subclasses say which units and which options."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED})
    dimensions: ClassVar[tuple[str, ...]] = ()
    keep: Amount | None = None
    """what stays: a percentage, or a number for each view as an expression over its dimensions"""
    score: Score = Magnitude()
    """how units are ranked"""
    round: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    """a divisor of the number of units that stay in a view"""

    @property
    def families(self) -> tuple[str, ...]:
        """The unit families that this step cuts."""
        raise NotImplementedError

    @property
    def allocation(self) -> Uniform | PerLayer | Global | Explicit:
        """How the budget is divided."""
        allocate: Uniform | PerLayer | Global | Explicit = getattr(self, "allocate", Uniform())
        return allocate

    @property
    def account(self) -> Account:
        """What the budget counts."""
        account: Account = getattr(self, "of", "units")
        return account

    @property
    def compensation(self) -> Compensate:
        """What replaces what goes."""
        compensate: Compensate = getattr(self, "compensate", "none")
        return compensate

    @model_validator(mode="after")
    def _check(self) -> WidthPass:
        check_keep(self.keep, self.allocation, self.dimensions)
        if isinstance(self.allocation, Explicit) and self.round != 1:
            raise ScalarError.about(
                "two_budgets", "round says nothing about units that are listed", help=("remove round",)
            )
        return self

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Energies are summed up by rows; the metric that needs absolute values takes whole weights."""
        return "whole" if isinstance(self.score, Fluctuation) and self.score.metric == "wifn" else "rows"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """The statistics of the score and of the compensation, for the views that the step covers."""
        return self._planner().taps(self, context)  # type: ignore[no-any-return]

    def plan(self, context: Context) -> Plan:
        """A cut or a decline for every view."""
        return self._planner().plan(self, context)  # type: ignore[no-any-return]

    def _planner(self) -> Any:
        from graphopt.passes.width import plan

        return plan
