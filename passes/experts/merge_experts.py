"""Merging of experts that do alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from graphopt.passkit import Context, Fact, Pass
from graphopt.select.options import Amount
from graphopt.spec import Expr

if TYPE_CHECKING:
    from graphopt.observe import Tap
    from graphopt.passkit.edits import Plan


class MergeExperts(Pass):
    """Replace experts that are alike by their weighted mean; the router and what its choices count stay as they are.

    Experts are joined two sets at a time, those first whose members are most alike on average (cosine of their weights, of
    what they make of the same rows of calibration text, or correlation of the router's scores for them), until as many are
    left as `keep` says. The matrices and
    biases of a set become their mean, weighted by how often the router uses each (M-SMoE, arXiv 2310.01334), and a table
    maps each of the router's choices to its set, so that merging experts that are equal changes nothing. The result
    equals the original with the mean in place of each member.

    ```yaml
    - use: merge_experts
      keep: experts / 2
      alike: outputs
      weigh: frequency
    ```
    """

    name = "merge_experts"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED})
    dimensions: ClassVar[tuple[str, ...]] = ("experts", "layers")

    keep: Amount
    """sets that stay in each layer: a percentage, or an expression over `experts`"""
    alike: Literal["weights", "outputs", "routing"] = "weights"
    """what is compared: the matrices, what experts make of the same calibration rows, or the router's scores for them"""
    weigh: Literal["equal", "frequency", "mass"] = "equal"
    """how members count in their mean: alike, by the share of tokens that choose them, or by what they count"""

    @model_validator(mode="after")
    def _check(self) -> MergeExperts:
        if isinstance(self.keep.value, Expr):
            self.keep.value.check(self.dimensions)
        return self

    def needs_calibration(self) -> bool:
        """Outputs and routing are seen on text."""
        return self.alike != "weights" or self.weigh != "equal"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """Rows of the banks and their routing, where they are asked for."""
        from graphopt.passes.experts.merging import taps

        return taps(self, context)

    def plan(self, context: Context) -> Plan:
        """A merge or a decline for every bank."""
        from graphopt.passes.experts.merging import plan

        return plan(self, context)
