"""An early exit: a further result that guesses the next token from the first layers alone."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.passkit.training import HeadsLoss, Losses, Recipe, Training

if TYPE_CHECKING:
    from graphopt.passes.speculative.exit import Exit
    from graphopt.passkit.edits import Plan, Train


class InsertExit(Pass):
    """Add an exit behind the first `layers` blocks; the results that the program had stay bit for bit.

    The exit is Kangaroo's adapter (arXiv 2404.18911): x + attention(norm(x)) with full heads and no feed-forward, a norm
    and the program's own output head. It takes heads and rotary positions from the attention before it, and begins
    without effect on the stream. With a cache put in behind it the draft and the program share the keys and values of
    the first blocks. The new result is `exit`.

    The adapter is then trained on the calibration text while every other weight stays, on what the program predicts at
    the same place (its `base` distribution, as upstream) or on the `text`. `recipe: null` leaves it untrained.

    ```yaml
    - use: insert_exit
      layers: 2
      recipe: {steps: 1000, rate: 1e-3}
    ```
    """

    name: ClassVar[str] = "insert_exit"
    effect: ClassVar[Effect] = Effect.UNTRAINED
    forbids: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.LOWERED, Fact.KV_CACHED, Fact.QUANTIZED, Fact.SPECULATIVE, Fact.TOKENS_DROPPED}
    )
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.SPECULATIVE})
    trains: ClassVar[bool] = True

    layers: Annotated[int, Field(ge=1)] = 2
    """blocks before the exit"""
    loss: HeadsLoss = HeadsLoss(target="base")
    """what the exit shall predict"""
    recipe: Recipe | None = Recipe(steps=1000)
    """steps, batches and rates of its training; none leaves it untrained"""

    def needs_calibration(self) -> bool:
        """It trains on the calibration text."""
        return self.recipe is not None

    def plan(self, context: Context) -> Plan:
        """One edit for the exit and one for its training, or a decline that says what the program lacks."""
        from graphopt.passes.speculative.exit import Exit, find_reads
        from graphopt.passes.speculative.heads import find_place
        from graphopt.passkit.edits import Decline, Plan

        blocks = len(context.views.blocks)
        if self.layers >= blocks:
            return Plan((), (Decline("model:exit", f"an exit behind {self.layers} of {blocks} blocks is none"),))
        if "exit" in context.program.entry.outputs:
            return Plan((), (Decline("model:exit", "the program has an exit already"),))
        place = find_place(context.views, embeds=False)
        if isinstance(place, str):
            return Plan((), (Decline("model:exit", place),))
        reads = find_reads(context.views, self.layers - 1)
        if isinstance(reads, str):
            return Plan((), (Decline("model:exit", reads),))
        exit = Exit(self.layers, reads, place, context.seed)
        if self.recipe is None:
            return Plan((exit,), (Decline("model:weights", "the step has no recipe, so the exit stays untrained"),))
        return Plan((exit, self._training(context, exit, self.recipe)))

    def _training(self, context: Context, exit: Exit, recipe: Recipe) -> Train:
        """All that the exit reads and the logits do not is trained."""
        from graphopt.passkit.edits import Train, apply_edits
        from graphopt.passkit.reach import parameters_of

        after = apply_edits(context.program, context.views, (exit,))
        nodes = dict(zip(after.entry.outputs, after.output_nodes, strict=True))
        frozen = set(parameters_of(after, [after.output_nodes[0]]))
        chosen = tuple(name for name in parameters_of(after, [nodes["exit"]]) if name not in frozen)
        parameters = sum(prod(after.weights[name].expr.shape) for name in chosen)
        return Train(Training(chosen, Losses(heads=self.loss), recipe), parameters)
