"""Decoding against the model's own weaker routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit import Context, Fact, Pass

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan


class SelfContrast(Pass):
    """Add a second, weak run of the layers, in which only the choice of one rank counts, and subtract its logits.

    SCMoE (arXiv 2405.14507): a token whose logit reaches the best one's plus log(alpha) scores (1 + beta) * strong - beta *
    weak; all others score -10000, which no decoding takes. Both runs read the same weights; what lies before the first
    routed layer is computed once. A cache that is inserted later holds the keys and values of both.

    ```yaml
    - use: self_contrast
      rank: 2
      alpha: 0.1
      beta: 0.5
    - use: insert_cache
    ```
    """

    name = "self_contrast"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED, Fact.KV_CACHED, Fact.SPECULATIVE})

    rank: Annotated[int, Field(ge=1)] = 2
    """the choice that counts in the weak run, from 1"""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    """how much less likely than the best one a token may be"""
    beta: Annotated[float, Field(ge=0)] = 0.5
    """how much of the weak run is subtracted"""

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Weights stay as they are."""
        return "none"

    def plan(self, context: Context) -> Plan:
        """A weak run through every bank that has such a choice, a decline for each that has not."""
        from graphopt.passes.experts.contrast import Contrast, Weaken
        from graphopt.passes.experts.narrow import Choices
        from graphopt.passes.experts.routing import candidates
        from graphopt.passkit.edits import Plan

        choices = Choices(rank=self.rank)
        banks, declines = candidates(context, choices)
        if not banks:
            return Plan((), tuple(declines))
        edits = [Weaken(bank.path, choices) for bank in banks]
        return Plan((*edits, Contrast(self.alpha, self.beta)), tuple(declines))
