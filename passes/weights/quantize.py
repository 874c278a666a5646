"""Weights in few bits: matrices of products and banks of experts, rounded by groups and stored packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passkit import Context, Fact, Pass
from graphopt.spec import ScalarError, Strict

if TYPE_CHECKING:
    from graphopt.observe import Tap
    from graphopt.passkit.edits import Plan

Bits = Annotated[int, Field(ge=1, le=8)]
Power = Annotated[float, Field(ge=0, le=8)]


class ExpertBits(Strict):
    """Widths of their own for the experts of each layer: MC-MoE's pre-loading mixed precision (arXiv 2410.06270).

    The widths minimise the sum over experts of (share of choices)^frequency * (share of what they count)^mass *
    (norm of the layer's error when that expert alone is rounded)^error; the minimum is exact, by dynamic programming.
    """

    widths: Annotated[tuple[Bits, ...], Field(min_length=1)] = (1, 2, 3)
    """bits that an expert may have"""
    average: float = Field(default=2.5, ge=1, le=8)
    """bits that the experts of a layer may have on average"""
    required: tuple[Bits, ...] = (2, 3)
    """widths that at least one expert of each layer has"""
    frequency: Power = 1.0
    mass: Power = 1.5
    error: Power = 2.0

    @model_validator(mode="after")
    def _check(self) -> ExpertBits:
        strange = sorted(set(self.required) - set(self.widths))
        if strange or len(set(self.widths)) != len(self.widths):
            raise ScalarError.about(
                "widths", f"required widths {list(self.required)} must be among distinct widths {list(self.widths)}"
            )
        if self.average < min(self.widths):
            raise ScalarError.about("widths", f"an average of {self.average} bits is below all of {list(self.widths)}")
        return self


class Quantize(Pass):
    """Round weights to few bits by groups of values and store them packed; each read unpacks what it needs.

    Every group of `group` values along the axis that a product sums over is rounded to the nearest point of a grid from
    its least to its largest value (one bit: plus and minus the mean magnitude). Banks of experts are matrices like
    others, each expert with groups of its own; `experts` gives each expert of a layer a width of its own (MC-MoE,
    arXiv 2410.06270). Routers, embeddings, what is tied to them and what lies outside the layers stay as they are. A bank
    that the step covers and cannot round is an error, never passed over in silence. The result equals the original with
    the rounded values in place of its weights.

    ```yaml
    - use: quantize
      bits: 4
      experts: {widths: [1, 2, 3], average: 2.5}
    ```
    """

    name = "quantize"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED})
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})

    bits: Bits = 4
    """bits of one value"""
    group: Annotated[int, Field(ge=1, le=1 << 16)] = 128
    """values that share a scale; the last group of a row may be shorter"""
    parts: Annotated[tuple[Literal["products", "experts"], ...], Field(min_length=1)] = ("products", "experts")
    """what is rounded: plain matrices of the layers, banks of experts"""
    experts: ExpertBits | None = None
    """widths for each expert instead of `bits` for all"""

    @model_validator(mode="after")
    def _check(self) -> Quantize:
        if self.experts is not None and "experts" not in self.parts:
            raise ScalarError.about("parts", "experts have widths, but are not among the parts that are rounded")
        return self

    def needs_calibration(self) -> bool:
        """What an expert's error costs is seen on text."""
        return self.experts is not None

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Whole banks, to see what rounding costs, where experts have widths of their own; no weight otherwise."""
        return "none" if self.experts is None else "whole"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """What the experts read and where it is routed, when they get widths of their own."""
        from graphopt.passes.weights.packing import taps

        return taps(self, context)

    def plan(self, context: Context) -> Plan:
        """An edit for each matrix, a reason for each that stays; raises PlanError for a bank that cannot be covered."""
        from graphopt.passes.weights.packing import plan

        return plan(self, context)
