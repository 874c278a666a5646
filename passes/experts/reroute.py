"""Routing: which of the experts that a router chose a token goes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passkit import Context, Fact, Pass
from graphopt.spec import ScalarError, Share

if TYPE_CHECKING:
    from graphopt.observe import Tap
    from graphopt.passkit.edits import Plan


class Reroute(Pass):
    """Send each token to fewer of the experts that its router chose.

    `top_k: n` keeps the best n choices, `rank: n` the n-th alone (SCMoE's weak routing, arXiv 2405.14507), and `below: b`
    drops, token by token, every choice that counts less than b times the best one (MC-MoE's online dropping, arXiv
    2410.06270; `median` is, layer by layer, the median of second over best on calibration text). Tokens that `protect`
    keeps lose none: those whose input is largest, which is how the released code of MC-MoE ranks them, here by a threshold
    from calibration text, so that the route of a token depends on no other token. What is left shares what all had; a
    choice of one rank counts 1. With `top_k` and `rank` fewer rows are computed; with `below` a dropped choice counts 0
    in the graph and is skipped as it runs, so that the cost, which is that of all choices, is a bound, and the plan notes
    the share of choices that calibration text drops.

    ```yaml
    - use: reroute
      below: median
      protect: 2%
      where: {layers: 2..-1}
    ```
    """

    name = "reroute"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED})

    top_k: Annotated[int, Field(ge=1)] | None = None
    """the best choices that stay"""
    rank: Annotated[int, Field(ge=1)] | None = None
    """the one choice that stays, counted from 1"""
    below: Annotated[float, Field(ge=0, le=1)] | Literal["median"] | None = None
    """the share of the best choice below which another is dropped"""
    protect: Share | None = None
    """tokens that keep all choices in spite of `below`: the largest of the calibration text, by absolute values"""

    @model_validator(mode="after")
    def _one_way(self) -> Reroute:
        given = [name for name in ("top_k", "rank", "below") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ScalarError.about(
                "which_choices",
                f"reroute takes exactly one of top_k, rank and below, not {' and '.join(given) or 'none of them'}",
                help=("write top_k: 1, rank: 2 or below: 0.5",),
            )
        if self.protect is not None and self.below is None:
            raise ScalarError.about("which_choices", "reroute reads protect only with below", help=("remove protect",))
        return self

    def needs_calibration(self) -> bool:
        """A median and the size of tokens are seen on text."""
        return self.below == "median" or self.protect is not None

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Weights stay as they are."""
        return "none"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """What choices count, where a median is asked for."""
        from graphopt.passes.experts.routing import taps

        return taps(self, context)

    def plan(self, context: Context) -> Plan:
        """New choices or a decline for every bank."""
        from graphopt.passes.experts.routing import plan

        return plan(self, context)
