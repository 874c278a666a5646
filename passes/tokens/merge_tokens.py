"""Fewer tokens in later layers: those that are alike become one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from graphopt.passes.tokens.base import TokenPass
from graphopt.passes.tokens.options import Alike, Pairs, Windows
from graphopt.spec.scalars import ScalarError

if TYPE_CHECKING:
    from graphopt.passes.tokens.span import Span
    from graphopt.passes.tokens.stage import Selection


class MergeTokens(TokenPass):
    """Average tokens that are alike, in front of chosen layers, until as many are left as `keep` says.

    `by: pairs` is bipartite matching (ToMe, arXiv 2210.09461): every second token of the span may go, those first whose
    likeness among the others is greatest, and where more than half shall go, the last of the others. Each that goes is
    averaged into the most similar token that stays. `by: windows` averages the most uniform windows of the grid of
    patches, each into its first token (the vision stage of MustDrop, arXiv 2411.10803, which merges by a threshold where
    here a number is kept). Averages are plain means; how many tokens one stands for is not kept. Spans, layers, amounts,
    positions and results are those of drop_tokens.

    ```yaml
    - use: merge_tokens
      span: patches
      layers: 1
      keep: 60%
      by: {kind: windows, size: 3}
    ```
    """

    name: ClassVar[str] = "merge_tokens"

    by: Alike = Pairs()
    """which tokens count as alike"""

    @model_validator(mode="after")
    def _fits(self) -> MergeTokens:
        if self.span == "answer":
            raise ScalarError.about(
                "unread", "words of an answer are admitted to caches or not", help=("use drop_tokens",)
            )
        if isinstance(self.by, Windows) and self.span != "patches":
            raise ScalarError.about("unread", f"span: {self.span} has no grid of windows", help=("use by: pairs",))
        amounts = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if self.span == "text" and any(isinstance(amount.value, int) for amount in amounts):
            raise ScalarError.about("bad_unit", "texts differ in length: keep a share of their tokens, such as 50%")
        return self

    def selection(self, span: Span) -> Selection:
        """By likeness."""
        from graphopt.passes.tokens.span import NoSpan
        from graphopt.passes.tokens.stage import Selection

        if isinstance(self.by, Windows) and span.grid == (0, 0):
            raise NoSpan("the patches are not the whole grid of one convolution")
        return Selection(span, self.by, "merge", self.positions, self.past)

    def check(self, span: Span, shares: Iterable[tuple[int, int]]) -> None:
        """Windows keep their first token: raises NoSpan when fewer shall stay than there are windows."""
        from graphopt.passes.tokens.span import NoSpan

        super().check(span, shares)
        if isinstance(self.by, Windows):
            rows, columns = span.grid
            least = -(-rows // self.by.size) * -(-columns // self.by.size)
            fewest = min(span.stay(share) for share in shares)
            if fewest < least:
                raise NoSpan(f"{fewest} tokens shall stay, but the grid has {least} windows, each of which keeps one")
