"""What the passes on tokens share: spans, layers, amounts, and a plan that answers for every layer."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from graphopt.diagnostics import PlanError
from graphopt.passes.tokens.options import Kept
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.spec.scalars import ScalarError
from graphopt.spec.selectors import Layers

if TYPE_CHECKING:
    from graphopt.passes.tokens.span import Span
    from graphopt.passes.tokens.stage import Selection, Stage
    from graphopt.passkit.edits import Decline, Plan


class TokenPass(Pass):
    """A pass after which later layers have fewer tokens; subclasses say which and what becomes of the others."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.TOKENS_DROPPED})

    span: Literal["patches", "image", "text", "answer"]
    """the tokens that may leave"""
    layers: Layers
    """the layers in front of which they leave, counted in the stack of the span"""
    keep: Kept | Annotated[tuple[Kept, ...], Field(min_length=1)]
    """how many stay: shares of the span, or a number of each picture's tokens"""
    positions: Literal["keep", "renumber"] = "keep"
    """whether tokens behind them move up"""

    @model_validator(mode="after")
    def _has_past(self) -> TokenPass:
        if self.past == "drop" and self.span == "patches":
            raise ScalarError.about("unread", "patches have no past: nothing is written behind them")
        return self

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Weights stay as they are."""
        return "none"

    past: Literal["keep", "drop"] = "keep"
    """whether words behind the prompt see, in layers in front of the last stage, what leaves there"""

    @property
    def ends(self) -> tuple[int, int]:
        """How many tokens at the beginning and at the end of a text stay."""
        return 1, 1

    def selection(self, span: Span) -> Selection:
        """How tokens of a span are chosen; raises NoSpan when they cannot be."""
        raise NotImplementedError

    def plan(self, context: Context) -> Plan:
        """An edit for each chosen layer, a decline for every other one; none at all where tokens cannot be followed."""
        from graphopt.passkit.edits import Plan

        stages, declines = self.stages(context)
        return Plan(tuple(stages), tuple(declines))

    def stages(self, context: Context) -> tuple[list[Stage], list[Decline]]:
        """The edits and the declines of `plan`."""
        from graphopt.ir.follow import Lost
        from graphopt.ir.rewriter import Rewriter
        from graphopt.passes.tokens.span import NoSpan, find_span
        from graphopt.passes.tokens.stage import Stage
        from graphopt.passkit.edits import Decline

        views = context.views
        names = [block.path for block in views.blocks] or ["model"]
        try:
            span = find_span(views, self.span, *self.ends)
            chosen = self.layers.resolve(len(span.blocks))
            shares = self._shares(span, chosen)
            span = span.at(chosen[0])
            selection = self.selection(span)
            self.check(span, shares.values())
        except NoSpan as reason:
            return [], [Decline(name, str(reason)) for name in names]
        stages: list[Stage] = []
        declines = []
        before = Fraction(1)
        for index, block in enumerate(span.blocks):
            if index not in shares:
                declines.append(Decline(block.path, "tokens pass it as they come"))
                continue
            share = Fraction(*shares[index])
            if share == before:
                declines.append(Decline(block.path, "every token that has come this far stays"))
                continue
            before = share
            stages.append(Stage(block.path, index, shares[index], selection, stages))
        declines += [Decline(block.path, "another stack") for block in views.blocks if block not in span.blocks]
        if stages:
            try:
                rewriter = Rewriter(context.program)
                for stage in stages:
                    stage.apply(rewriter, views)
            except Lost as reason:
                declines += [Decline(stage.view, f"fewer tokens have no meaning: {reason}") for stage in stages]
                stages = []
        return stages, declines

    def check(self, span: Span, shares: Iterable[tuple[int, int]]) -> None:
        """Raise NoSpan when options do not fit the span."""
        from graphopt.ops import attention
        from graphopt.passes.tokens.span import NoSpan

        if self.past == "drop" and any(
            a.core.target is not attention for block in span.blocks for a in block.attentions
        ):
            raise NoSpan("past: drop needs plain attention, without bounded heads")
        if self.positions == "renumber":
            cores = [a for block in span.blocks for a in block.attentions]
            if any(a.window is not None or a.positions == "bias" for a in cores):
                raise NoSpan("positions: renumber needs attention without windows and biases by distance")

    def _shares(self, span: Span, chosen: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        """The share of the whole span that stays in front of each chosen layer."""
        count = span.whole or (span.splice.entries if span.splice is not None else 1)
        if not isinstance(self.keep, tuple):
            over, under = self.keep.of(count)
            number = isinstance(self.keep.value, int)
            return {layer: (over, under) if number else (over**i, under**i) for i, layer in enumerate(chosen, 1)}
        if len(self.keep) != len(chosen):
            raise PlanError.of(
                "stage_count",
                f"{self.name} has {len(self.keep)} amounts for {len(chosen)} layers",
                notes=(f"layers: {', '.join(map(str, chosen))}",),
                help=("write one amount for each layer, or one for all",),
            )
        found = [amount.of(count) for amount in self.keep]
        values = [Fraction(*each) for each in found]
        for place, (earlier, later) in enumerate(pairwise(values)):
            if later <= earlier:
                continue
            raise PlanError.of(
                "stage_order",
                f"{self.name} cannot bring tokens back: later layers keep at most as many",
                notes=(
                    f"layer {chosen[place + 1]} would keep {self.keep[place + 1]}, layer {chosen[place]} before it"
                    f" {self.keep[place]}",
                ),
                help=(
                    "write amounts that fall: each is a share of all tokens, not of those that the stage before left",
                ),
            )
        return dict(zip(chosen, found, strict=True))
