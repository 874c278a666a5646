"""Bounded caches: heads that keep some of the past only, as a mask that insert_cache turns into smaller buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.select.options import Choice
from graphopt.spec import Percent, ScalarError, Share, Shorthand

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan
    from graphopt.views import Attention

Entries = Annotated[int, Field(ge=0, le=1 << 20)]


class ByProbe(Choice):
    """RazorAttention (arXiv 2407.15891): heads that find earlier copies in random tokens, repeated, keep everything.

    Echo is the attention that a token pays to its earlier copies, induction what it pays to the tokens behind them. Heads
    of all layers are ranked, a KV head by the best of its query heads.
    """

    kind: Literal["probe"] = "probe"
    induction: Share = Percent.parse("14%")
    """share of all KV heads that is protected for its induction"""
    echo: Share = Percent.parse("1%")
    """share that is protected for its echo"""
    tokens: Annotated[int, Field(ge=2, le=1 << 16)] = 64
    """random tokens of the probe"""
    repeats: Annotated[int, Field(ge=2, le=64)] = 4
    """how often they are repeated"""


class ByGates(Choice):
    """DuoAttention (arXiv 2410.10819): the heads with the largest gates, learnt by an earlier learn_gates step."""

    kind: Literal["gates"] = "gates"
    keep: Share = Percent.parse("50%")
    """share of all gated KV heads that keeps everything"""


class ByName(Choice):
    """The KV heads themselves, by layer."""

    kind: Literal["heads"] = "heads"
    heads: dict[int, tuple[int, ...]]


Protect = Annotated[ByProbe | ByGates | ByName, Field(discriminator="kind"), Shorthand("kind")]


class BoundCache(Pass):
    """Let KV heads keep the first `sink` tokens, the last `recent` ones, and `heavy` others or a mean of what is gone.

    With `sink` and `recent` alone this is StreamingLLM (arXiv 2309.17453). `heavy` keeps as many more that have received
    the most attention since they came (H2O, arXiv 2306.14048): in prefill as in decoding, the least of them goes after
    each token, and never returns. `compensate` adds one entry, the mean key and value of all that is gone, which counts
    as often as there were entries (RazorAttention, arXiv 2407.15891). `protect` names KV heads that keep everything:
    those with the largest learnt gates (DuoAttention, arXiv 2410.10819), those that a probe finds, or a table by layer.

    What a token sees depends on the text alone and not on how it is fed, prompts included: a mask, which the stateless
    program computes and which insert_cache, behind this step, turns into buffers of `sink` + `recent` + `heavy` entries.
    `positions: renumber` lets a token stand at its place inside the cache; it needs rotary embedding. Attention with a
    window of its own, with a computed mask, or over another text is declined.

    ```yaml
    - use: bound_cache
      sink: 4
      recent: 252
      protect: {kind: probe, induction: 14%, echo: 1%}
      compensate: true
    ```
    """

    name: ClassVar[str] = "bound_cache"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})

    sink: Entries = 4
    """tokens at the beginning that stay"""
    recent: Annotated[int, Field(ge=1, le=1 << 20)] = 252
    """last tokens that stay, the newest included"""
    heavy: Entries = 0
    """other tokens that stay, by the attention that they have received"""
    compensate: bool = False
    """whether one entry stands for what is gone"""
    positions: Literal["keep", "renumber"] = "keep"
    """whether tokens keep their places in the text, or stand at those inside the cache"""
    protect: Protect | None = None
    """KV heads that keep everything; none where absent"""

    @model_validator(mode="after")
    def _together(self) -> BoundCache:
        if self.heavy and self.compensate:
            raise ScalarError.about("two_actions", "heavy and compensate both say what becomes of old tokens")
        if self.positions == "renumber" and (self.heavy or self.compensate):
            other = "heavy" if self.heavy else "compensate"
            raise ScalarError.about(
                "no_renumbering",
                f"positions cannot be renumbered with {other}: cached keys would have to be turned again",
                help=("write positions: keep",),
            )
        return self

    def plan(self, context: Context) -> Plan:
        """An edit for each attention that `where` selects, or a decline with the reason."""
        from graphopt.passes.cache.bounded import Bound, fits, marked, turnable
        from graphopt.passkit.edits import Decline, Plan

        program = context.program
        layers = {a.core: block for block in context.views.blocks for a in block.attentions}
        edits, declines, fit = [], [], []
        for attention in context.views.attentions:
            block = layers.get(attention.core)
            if block is None or not context.covers(block.index, block.path):
                declines.append(Decline(context.views.candidate(attention), "where does not cover it"))
                continue
            reason = fits(program, attention)
            if reason is None and self.positions == "renumber":
                reason = turnable(program, attention.core)
            if reason is None and self.compensate:
                reason = marked(attention.core)
            if reason is None:
                fit.append((block.index, attention))
            else:
                declines.append(Decline(attention.path, reason))
        kept, notes = self._protected(context, fit)
        for _, attention in fit:
            heads = tuple(h for h in range(attention.kv_heads) if h not in kept.get(attention.path, ()))
            if not heads and attention.core.target is not _gated():
                declines.append(Decline(attention.path, "all its KV heads are protected"))
                continue
            edits.append(
                Bound(
                    attention.path,
                    attention.core.name,
                    heads,
                    attention.kv_heads,
                    self.sink,
                    self.recent,
                    self.heavy,
                    self.compensate,
                    self.positions == "renumber",
                )
            )
        return Plan(tuple(edits), tuple(declines), notes)

    def _protected(
        self, context: Context, fit: list[tuple[int, Attention]]
    ) -> tuple[dict[str, set[int]], dict[str, object]]:
        """KV heads that keep everything, by the attention's path, and what they were chosen by."""
        from graphopt.passes.cache import protect

        if self.protect is None or not fit:
            return {}, {}
        if isinstance(self.protect, ByName):
            return protect.named(fit, self.protect.heads), {}
        attentions = [attention for _, attention in fit]
        if isinstance(self.protect, ByGates):
            scores = {"gates": protect.gates(context.program, attentions)}
            shares = {"gates": self.protect.keep}
        else:
            scores = protect.probe(context.program, attentions, self.protect.tokens, self.protect.repeats, context.seed)
            shares = {"induction": self.protect.induction, "echo": self.protect.echo}
        return protect.best(scores, shares), {"scores": protect.rounded(scores)}


def _gated() -> object:
    import torch

    return torch.ops.graphopt.bounded_attention.default
