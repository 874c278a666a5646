"""A graphopt pass that takes out every layer of odd index, written with public names alone."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphopt import Pass
from graphopt.passkit import Context, Decline, Effect, Plan, Skip

__all__ = ["SkipOdd"]


class SkipOdd(Pass):
    """Take out layers of odd index.

    ```yaml
    - use: skip_odd
      first: 3
    ```
    """

    name: ClassVar[str] = "skip_odd"
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    first: Annotated[int, Field(ge=1)] = 1
    """the first layer that may go"""

    def plan(self, context: Context) -> Plan:
        """An edit for each odd layer from `first` on, a decline for every other."""
        if not context.views.blocks:
            return Plan((), (Decline("model", "it has no layers"),))
        edits, declines = [], []
        for block in context.views.blocks:
            if block.index % 2 and block.index >= self.first and context.covers(block.index, block.path):
                edits.append(Skip(block.path, block.index, why="odd"))
            else:
                declines.append(Decline(block.path, "even, too early, or outside where"))
        return Plan(tuple(edits), tuple(declines))
