"""The edit that lets tokens leave in front of one layer. All stages of a plan are carried out in one walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.passkit.edits import Edit

if TYPE_CHECKING:
    from graphopt.ir.rewriter import Rewriter
    from graphopt.passes.tokens.span import Span
    from graphopt.select.options import Choice
    from graphopt.views import Views


@dataclass(frozen=True)
class Selection:
    """What all stages of a step share: how tokens are scored, what becomes of those that leave, and places."""

    span: Span
    score: Choice
    action: str
    positions: str
    past: str = "keep"


@dataclass(frozen=True, eq=False)
class Stage(Edit):
    """In front of layer `layer` of the span's stack only `share` (numerator, denominator) of its tokens stays."""

    view: str
    layer: int
    share: tuple[int, int]
    selection: Selection
    stages: list[Stage]

    @property
    def candidate(self) -> str:
        """The layer."""
        return self.view

    @property
    def kind(self) -> str:
        """What tokens are chosen by."""
        return str(self.selection.score.model_dump()["kind"])

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights of the stage's own network, where it has one."""
        if self.kind != "predictor":
            return ()
        return tuple(f"{self.view}.tokens.{name}" for name in ("up.weight", "up.bias", "down.weight"))

    def describe(self) -> str:
        """How many stay, by what."""
        over, under = self.share
        kind, score = self.selection.span.kind, self.kind
        return f"{self.view}: {self.selection.action} {kind} tokens by {score}, keep {100 * over / under:g}%"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        span = self.selection.span
        return {
            "edit": "stage",
            "view": self.view,
            "layer": self.layer,
            "keep": list(self.share),
            "span": span.kind,
            "of": span.whole or (span.splice.entries if span.splice else None),
            "score": self.selection.score.model_dump(mode="json"),
            "action": self.selection.action,
            "positions": self.selection.positions,
            "past": self.selection.past,
        }

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Gather the tokens that stay; carried out by the last stage for all."""
        self._walk(rewriter, views, masked=False)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """The same by masks: every token goes on, but nobody sees those that have left, and their results are zero."""
        self._walk(rewriter, views, masked=True)

    def _walk(self, rewriter: Rewriter, views: Views, masked: bool) -> None:
        from graphopt.passes.tokens.gathered import Gathered
        from graphopt.passes.tokens.masked import Masked

        if self is self.stages[-1]:
            walk = (Masked if masked else Gathered)(rewriter, views, self.selection, tuple(self.stages))
            walk.run()
            walk.carry()
