"""Draft heads: further results that guess the tokens behind the next one."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.passkit.training import HeadsLoss, Losses, Recipe, Training

if TYPE_CHECKING:
    from graphopt.passes.speculative.heads import Heads
    from graphopt.passkit.edits import Plan, Train


class InsertHeads(Pass):
    """Add K draft heads that read what the output head reads; the results that the program had stay bit for bit.

    `medusa` (arXiv 2401.10774): head k maps the hidden state h of position t by residual blocks SiLU(W h + b) + h to
    logits of the token at t + k + 1. `hydra` (arXiv 2402.05109): head k also reads the embeddings of the k tokens in
    between, [h ; e_1 ; ... ; e_k], which its first block maps to the width of h; drafts then depend on their path.
    W and b begin at zero and the outputs as the program's own output head, so that an untrained head repeats the next
    token's logits. `output: shared` keeps the program's output head for all heads and trains the blocks alone.
    New results are `hidden` and `heads.1` to `heads.K`; the runtime splits the program there.

    The heads are then trained on the calibration text while every other weight stays: head k on the token k + 1 places
    ahead, with weight decay^k, where the `text` itself is the target (Medusa) or what the program predicts there, its
    `base` distribution (Hydra). `recipe: null` leaves them untrained.

    ```yaml
    - use: insert_heads
      kind: medusa
      heads: 3
      loss: {target: base}
      recipe: {steps: 1000, rate: 1e-3}
    ```
    """

    name: ClassVar[str] = "insert_heads"
    effect: ClassVar[Effect] = Effect.UNTRAINED
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED, Fact.QUANTIZED, Fact.SPECULATIVE})
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.SPECULATIVE})
    trains: ClassVar[bool] = True

    kind: Literal["medusa", "hydra"] = "medusa"
    """what a head reads"""
    heads: Annotated[int, Field(ge=1, le=16)] = 4
    """how many tokens behind the next one are guessed"""
    layers: Annotated[int, Field(ge=1, le=8)] = 1
    """residual blocks of a head"""
    output: Literal["own", "shared"] = "own"
    """whether each head has an output matrix of its own, or all use the program's"""

    loss: HeadsLoss = HeadsLoss(target="base")
    """what the heads shall predict"""
    recipe: Recipe | None = Recipe(steps=1000)
    """steps, batches and rates of their training; none leaves them untrained"""

    def needs_calibration(self) -> bool:
        """It trains on the calibration text."""
        return self.recipe is not None

    def plan(self, context: Context) -> Plan:
        """One edit for all heads and one for their training, or a decline that says what the program lacks."""
        from graphopt.passes.speculative.heads import Heads, find_place
        from graphopt.passkit.edits import Decline, Plan

        place = find_place(context.views, embeds=self.kind == "hydra")
        if isinstance(place, str):
            return Plan((), (Decline("model:heads", place),))
        heads = Heads(self.kind, self.heads, self.layers, self.output == "own", place)
        if self.recipe is None:
            return Plan((heads,), (Decline("model:weights", "the step has no recipe, so the heads stay untrained"),))
        return Plan((heads, self._training(context, heads, self.recipe)))

    def _training(self, context: Context, heads: Heads, recipe: Recipe) -> Train:
        """All that the heads read and the logits do not is trained."""
        from graphopt.passkit.edits import Train, apply_edits
        from graphopt.passkit.reach import parameters_of

        after = apply_edits(context.program, context.views, (heads,))
        nodes = dict(zip(after.entry.outputs, after.output_nodes, strict=True))
        frozen = set(parameters_of(after, [after.output_nodes[0]]))
        read = parameters_of(after, [node for name, node in nodes.items() if name.startswith("heads.")])
        chosen = tuple(name for name in read if name not in frozen)
        parameters = sum(prod(after.weights[name].expr.shape) for name in chosen)
        return Train(Training(chosen, Losses(heads=self.loss), recipe), parameters)
