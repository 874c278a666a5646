"""Quantised caches: older keys and values in few bits, as arithmetic that insert_cache turns into packed buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan


class QuantizeCache(Pass):
    """Let attention read all but the last tokens in few bits: keys by channel, values by token (KIVI, arXiv 2402.02750).

    Tokens are taken in blocks of `group`. Each feature of a block's keys has a scale and a lowest value of its own, and
    so has every run of `group` features of a token's values. A query reads the last `recent` tokens in full precision,
    its own among them, and a block in few bits once it stands before these as a whole, so that between `recent` and
    `recent` + `group` - 1 tokens are whole.

    What a token reads depends on the text alone and not on how it is fed, prompts included: the stateless program
    computes it, and insert_cache, behind this step, turns it into packed blocks and a ring of `recent` + `group` tokens.
    A token tree over such a cache may be `recent` deep. Attention that a window or a policy bounds, with a computed
    mask, or over another text is declined.

    ```yaml
    - use: quantize_cache
      bits: 2
    - use: insert_cache
    ```
    """

    name: ClassVar[str] = "quantize_cache"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})

    bits: Literal[8, 4, 2] = 4
    """bits of a cached number"""
    group: Annotated[int, Field(ge=8, le=1 << 10, multiple_of=8, examples=[8, 16])] = 32
    """tokens of a block, and features of a value, that share a scale"""
    recent: Annotated[int, Field(ge=8, le=1 << 20, examples=[8, 13])] = 128
    """last tokens that stay in full precision, the newest included"""

    def plan(self, context: Context) -> Plan:
        """An edit for each attention that `where` selects, or a decline with the reason."""
        from graphopt.passes.cache.bounded import fits
        from graphopt.passes.cache.packed import Coarse
        from graphopt.passkit.edits import Decline, Plan

        layers = {a.core: block for block in context.views.blocks for a in block.attentions}
        edits: list[Coarse] = []
        declines = []
        for attention in context.views.attentions:
            block = layers.get(attention.core)
            if block is None or not context.covers(block.index, block.path):
                declines.append(Decline(context.views.candidate(attention), "where does not cover it"))
                continue
            reason = fits(context.program, attention, "quantised")
            if reason is None:
                edits.append(Coarse(attention.path, attention.core.name, self.bits, self.group, self.recent))
            else:
                declines.append(Decline(attention.path, reason))
        return Plan(tuple(edits), tuple(declines))
