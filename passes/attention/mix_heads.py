"""Mixture of heads: each token takes some of the heads of an attention, as tokens take experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passkit import Context, Fact, Pass
from graphopt.select.options import Amount
from graphopt.spec import Expr

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan


class MixHeads(Pass):
    """Let each token choose among the heads of every attention: MoH (arXiv 2410.11842).

    The first `shared` heads count for all tokens; of the others each token takes the best, as many as make `keep` heads in
    all. With `by: query_norm` heads are ranked by the norm of the token's query, a head that is not taken counts 0 and
    every other one 1, and there is nothing to train. With `by: router` a new product of the token scores the heads: taken
    ones count their share times their number, shared ones likewise by a product of their own, and a third product weighs
    the two kinds; all start at zero, so that `keep: heads` starts as the model itself, and `recover` trains them. With
    `unit: kv_group` heads that share keys and values are taken together, so that a cache need not be read for the others;
    with `experts` the units are so many groups of as many heads each.

    With `attends: routed` a unit is an expert of its own, as in Union of Experts (arXiv 2503.02495): a token that takes it
    sees there only those tokens that took it, too. Keys of the others are hidden by one feature more, which a cache keeps
    with them; tokens keep their positions. `each: sequence` lets all tokens of a sequence take the same units.

    ```yaml
    - use: mix_heads
      keep: 3 * heads / 4
      shared: heads / 2
    ```
    """

    name = "mix_heads"
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.QUANTIZED, Fact.KV_CACHED})
    dimensions: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "layers")

    keep: Amount
    """units that count for a token, the shared ones among them"""
    shared: Amount | None = None
    """units that count for all tokens; none by default"""
    unit: Literal["query", "kv_group"] = "query"
    """heads alone, or all heads of a KV head together"""
    experts: Annotated[int, Field(ge=2, le=4096)] | None = None
    """units in place of those of `unit`: so many groups of heads of equal size, in the order of the heads"""
    by: Literal["query_norm", "router"] = "query_norm"
    """how a token ranks the units: by its queries, or by a product that is trained"""
    attends: Literal["all", "routed"] = "all"
    """what a token sees in a unit that it took: all tokens, or those that took it, too"""
    each: Literal["token", "sequence"] = "token"
    """what chooses: each token, or whole sequences by the mean over their tokens, later ones included"""

    @model_validator(mode="after")
    def _check(self) -> MixHeads:
        for amount in (self.keep, self.shared):
            if amount is not None and isinstance(amount.value, Expr):
                amount.value.check(self.dimensions)
        return self

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Weights stay as they are."""
        return "none"

    def plan(self, context: Context) -> Plan:
        """A choice of heads or a decline for every attention."""
        from graphopt.passes.attention.head_choice import plan

        return plan(self, context)
