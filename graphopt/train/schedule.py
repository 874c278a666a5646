"""Learning-rate schedules."""

from __future__ import annotations

import math

from graphopt.passkit.training import Recipe


def factor(recipe: Recipe, step: int) -> float:
    """Share of the largest rate at `step` (0 the first): a linear rise over the warm-up, then the schedule to `floor`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    left = 1 - progress if recipe.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return recipe.floor + (1 - recipe.floor) * left
