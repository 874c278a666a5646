"""Momentum across layers: what experts add to the stream carries on into the layers behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit import Context, Fact, Pass

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan


class AddMomentum(Pass):
    """Make the residual of every expert layer a heavy-ball step: p = momentum * p + step * u(h), h = h + p.

    MomentumSMoE (arXiv 2410.14574): u is what the experts of a layer add to the stream, p starts at 0 before the first
    layer and is carried from one expert layer to the next. momentum 0 and step 1 leave the model as it is. The released
    code subtracts p, which `step: -1` says. A pretrained model wants momentum near 0 and training behind this step.

    ```yaml
    - use: add_momentum
      momentum: 0.1
    ```
    """

    name = "add_momentum"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """how much of the last step is carried on"""
    step: float = Field(default=1.0, allow_inf_nan=False)
    """what a layer's own output counts"""

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Weights stay as they are."""
        return "none"

    def plan(self, context: Context) -> Plan:
        """A step for every expert layer, a decline for each that has another form."""
        from graphopt.passes.experts.momentum import plan

        return plan(self, context)
