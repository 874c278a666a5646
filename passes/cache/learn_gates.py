"""Gates that learn which KV heads need everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from graphopt.passes.cache.bound_cache import Entries
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.passkit.training import HiddenLoss, Losses, Recipe, Training, Weight

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan


class LearnGates(Pass):
    """Give each KV head a gate between whole and bounded attention, and learn what it costs to close it.

    A head gives gate x whole + (1 - gate) x bounded, where bounded sees the first `sink` and the last `recent` tokens
    (DuoAttention, arXiv 2410.10819). Gates begin at 1, so that nothing changes, and are trained on the calibration text
    while every other weight stays: the stream after the last block shall stay what it was, and the mean gate, weighted
    by `sparsity`, small. A bound_cache step with `protect: gates` then keeps the heads with the largest ones whole and
    removes the gates. `recipe: null` leaves them at 1.

    ```yaml
    - use: learn_gates
      sink: 4
      recent: 60
      sparsity: 0.05
      recipe: {steps: 300, rate: 2e-2}
    ```
    """

    name: ClassVar[str] = "learn_gates"
    effect: ClassVar[Effect] = Effect.UNTRAINED
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})
    trains: ClassVar[bool] = True

    sink: Entries = 4
    """tokens at the beginning that a bounded head sees"""
    recent: Annotated[int, Field(ge=1, le=1 << 20)] = 252
    """last tokens that a bounded head sees"""
    sparsity: Weight = 0.05
    """weight of the mean gate in the loss"""
    recipe: Recipe | None = Recipe(steps=2000, rate=2e-2)
    """steps, batches and rates of the training; none leaves the gates at 1"""

    def needs_calibration(self) -> bool:
        """It trains on the calibration text."""
        return self.recipe is not None

    def plan(self, context: Context) -> Plan:
        """An edit for each attention that `where` selects and one for the training, or declines with the reason."""
        from graphopt.ops import bounded_attention
        from graphopt.passes.cache.bounded import Gate, fits
        from graphopt.passkit.edits import Decline, Plan, Train

        blocks = context.views.blocks
        layers = {a.core: block for block in blocks for a in block.attentions}
        edits, declines = [], []
        for attention in context.views.attentions:
            block = layers.get(attention.core)
            covered = block is not None and context.covers(block.index, block.path)
            reason = fits(context.program, attention) if covered else "where does not cover it"
            if attention.core.target is bounded_attention:
                reason = "it is bounded already"
            if reason is not None:
                declines.append(Decline(context.views.candidate(attention), reason))
                continue
            edits.append(Gate(attention.path, attention.core.name, attention.kv_heads, self.sink, self.recent))
        if not edits:
            return Plan((), tuple(declines))
        if self.recipe is None:
            declines.append(Decline("model:weights", "the step has no recipe, so the gates stay at 1"))
            return Plan(tuple(edits), tuple(declines))
        losses = Losses(hidden=HiddenLoss(blocks=(blocks[-1].path,)), gates=self.sparsity)
        training = Training(tuple(edit.weight for edit in edits), losses, self.recipe, None, "before")
        train = Train(training, sum(edit.kv_heads for edit in edits))
        return Plan((*edits, train), tuple(declines))
