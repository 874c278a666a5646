"""Pruning of experts."""

from __future__ import annotations

from typing import ClassVar, Literal

from graphopt.passes.width.base import WidthPass
from graphopt.select.options import Allocate, ExpertScore, Magnitude, Uniform


class PruneExperts(WidthPass):
    """Remove experts: their matrices in every bank, their biases, and their rows of the router.

    Where a router chooses groups of experts first, the same number stays in each group; as many experts stay as are
    chosen for each token. The result equals the original with the router's scores of the removed experts at minus
    infinity, so that they are never chosen and the others share what they had.

    Scores: routing (the share of tokens that choose an expert, or what it counts for them, on calibration text);
    magnitude; order.

    ```yaml
    - use: prune_experts
      keep: 3 * experts / 4
      score: {kind: routing, metric: mass}
    ```
    """

    name = "prune_experts"
    dimensions: ClassVar[tuple[str, ...]] = ("experts", "layers")

    score: ExpertScore = Magnitude()  # type: ignore[assignment]
    """how experts are ranked"""
    allocate: Allocate = Uniform()
    """how the budget is divided over layers"""
    of: Literal["units", "parameters"] = "units"
    """what a global budget counts"""

    @property
    def families(self) -> tuple[str, ...]:
        """Experts."""
        return ("expert",)
