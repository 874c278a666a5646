"""Recovery: the program is trained to do again what another program did before surgery."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.passkit.training import LogitsLoss, Lora, Losses, Recipe, Training

if TYPE_CHECKING:
    from graphopt.passkit.edits import Decline, Plan


class Recover(Pass):
    """Distil the program, as the steps before left it, from one that they have not changed yet.

    The calibration text is the training text. `loss` adds up terms: the teacher's `logits` (KL divergence at a
    temperature, arXiv 1503.02531; what Minitron retrains by, arXiv 2407.14679), its `hidden` states after each block,
    and the text's own `next_token`. `teacher` is the `original` model or the id of an earlier step, which teaches as it
    was after that step. Weights are trained in float32 and rounded once to the type that they are stored in. Planning
    only says what would be trained.

    ```yaml
    - use: recover
      loss: {logits: {temperature: 2}, next_token: 0.1}
      recipe: {steps: 200, rate: 5e-4}
    ```
    """

    name: ClassVar[str] = "recover"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED, Fact.QUANTIZED})

    weights: Literal["all", "changed", "routers"] = "all"
    """whether all parameters that the result reads are trained, only those that steps changed, or only the matrices by which
    experts are chosen; `where` narrows each"""
    loss: Losses = Losses(logits=LogitsLoss())
    """what is minimised"""
    teacher: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$", examples=["original"])] = "original"
    """`original`, or the id of the step that left the teacher"""
    lora: Lora | None = None
    """train low-rank changes of matrices instead of the weights, merged at the end"""
    recipe: Recipe = Recipe()
    """steps, batches and rates"""

    trains: ClassVar[bool] = True

    def needs_calibration(self) -> bool:
        """It trains on the calibration text."""
        return True

    def refers_to(self) -> tuple[str, ...]:
        """The step that left the teacher."""
        return () if self.teacher == "original" else (self.teacher,)

    def plan(self, context: Context) -> Plan:
        """One edit that lists what is trained; declines say what is not and why."""
        from graphopt.ir.weights import Source
        from graphopt.passkit.edits import Decline, Plan, Train
        from graphopt.passkit.reach import parameters_of

        program = context.program
        found = parameters_of(program, [program.output_nodes[0]])
        chosen = [name for name in found if name in self._covered(context)]
        declines: list[Decline] = []
        if len(chosen) < len(found):
            declines.append(Decline("model:elsewhere", f"{len(found) - len(chosen)} weights are outside where"))
        if self.weights == "changed":
            kept = [name for name in chosen if isinstance(program.weights[name].expr, Source)]
            chosen = [name for name in chosen if name not in kept]
            if kept:
                declines.append(Decline("model:unchanged", f"{len(kept)} weights are as they were loaded"))
        if self.weights == "routers":
            routers = {bank.router.weight for bank in context.views.experts if bank.router is not None}
            others = [name for name in chosen if name not in routers]
            chosen = [name for name in chosen if name in routers]
            if others:
                declines.append(Decline("model:others", f"{len(others)} weights are no routers"))
        if self.lora is not None:
            flat = [name for name in chosen if len(program.weights[name].expr.shape) != 2]
            chosen = [name for name in chosen if name not in flat]
            if flat:
                declines.append(Decline("model:vectors", f"{len(flat)} weights are no matrices, as LoRA needs"))
        if not chosen:
            return Plan((), (*declines, Decline("model:weights", "no weight is left to train")))
        parameters = sum(prod(program.weights[name].expr.shape) for name in chosen)
        teacher = self.teacher if self.loss.needs_teacher else None
        training = Training(tuple(chosen), self.loss, self.recipe, self.lora, teacher)
        return Plan((Train(training, parameters),), tuple(declines))

    def _covered(self, context: Context) -> set[str]:
        """Weights that `where` selects: those read in its blocks, or all when it selects every block."""
        blocks = context.views.blocks
        if not context.paths and len(context.layers) == len(blocks):
            return set(context.program.weights)
        inside = [node for block in blocks if context.covers(block.index, block.path) for node in block.nodes]
        return {source.meta["weight"] for node in inside for source in node.all_input_nodes if "weight" in source.meta}
