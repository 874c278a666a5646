"""Speculative decoding as a step: says who drafts; the graph stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.drafting import Drafter, Drafting
from graphopt.passkit.facts import Effect, Fact

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan

NEEDS = {"exit": ("exit", "insert_exit"), "heads": ("heads.1", "insert_heads")}


class Speculate(Pass):
    """Let a drafter propose tokens, which one run of the program verifies together.

    The program is not changed; how it decodes is kept in its trail, and `graphopt generate` does so. Tokens (greedy) or
    their law (sampling) are those of plain decoding, except with `accept: typical` at temperatures above 0. Verification
    decodes with and without the drafter and compares.

    ```yaml
    - use: speculate
      drafter: {kind: copy, match: 3, length: 10}
    ```
    """

    name: ClassVar[str] = "speculate"
    effect: ClassVar[Effect] = Effect.EXACT
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})

    drafter: Drafter
    """who proposes tokens"""
    rows: Annotated[tuple[Annotated[int, Field(ge=2, le=256)], ...], Field(min_length=1, max_length=8)] = (2, 4, 8)
    """tokens that a step may verify, the decided one included; the best by measured tokens a second, plain decoding
    among them, is used"""
    adapt: bool = True
    """whether the number of rows follows what was measured; otherwise it is the largest"""
    accept: Literal["exact", "typical"] = "exact"
    """how drafted tokens are accepted when tokens are drawn"""

    def plan(self, context: Context) -> Plan:
        """One edit that says how the program decodes, or a decline that says what it lacks."""
        from graphopt.passkit.edits import Decline, Plan
        from graphopt.passkit.speculation import Speculation

        program, drafter = context.program, self.drafter
        if not any(spec.role == "tokens" for spec in program.entry.inputs):
            return Plan((), (Decline("model:decoding", "it takes no tokens, so there is nothing to decode"),))
        lacking, from_pass = NEEDS.get(drafter.kind, (None, None))
        if lacking is not None and lacking not in program.entry.outputs:
            reason = f"it has no result {lacking!r}, from which {drafter.kind} drafts; {from_pass} adds it"
            return Plan((), (Decline("model:decoding", reason),))
        share = getattr(drafter, "skip", None)
        if share is not None:
            inner = sum(len(block.sublayers) for block in context.views.blocks[1:-1])
            if int(inner * share) < 1:
                reason = f"a share of {share:g} of {inner} sub-layers between the first and the last block is none"
                return Plan((), (Decline("model:decoding", reason),))
        drafting = Drafting(drafter=drafter, rows=self.rows, adapt=self.adapt, accept=self.accept)
        return Plan((Speculation(drafting),))
