"""Pruning of feed-forward neurons."""

from __future__ import annotations

from typing import ClassVar, Literal

from graphopt.passes.width.base import WidthPass
from graphopt.select.options import Allocate, Compensate, Uniform


class PruneNeurons(WidthPass):
    """Remove feed-forward neurons: rows of the up (and gate) projection and columns of the down projection.

    The result equals the original with the activations of the removed neurons set to zero, or to their mean with
    `compensate: mean_bias`. `round` keeps widths divisible, as matrix units like them.

    Scores: magnitude; fluctuation (FLAP, arXiv 2312.11983); activation (Minitron, arXiv 2407.14679); taylor
    (arXiv 1906.10771); order.

    ```yaml
    - use: prune_neurons
      keep: round_to(0.75 * neurons, 32)
      score: activation
      compensate: mean_bias
    ```
    """

    name = "prune_neurons"
    dimensions: ClassVar[tuple[str, ...]] = ("neurons", "hidden", "layers")

    allocate: Allocate = Uniform()
    """how the budget is divided over layers"""
    of: Literal["units", "parameters", "flops"] = "units"
    """what a global budget counts"""
    compensate: Compensate = "none"
    """what replaces the removed neurons: nothing, or their mean as a bias of the down projection"""

    @property
    def families(self) -> tuple[str, ...]:
        """Neurons."""
        return ("neuron",)
