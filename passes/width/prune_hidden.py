"""Pruning of the residual stream's width."""

from __future__ import annotations

from typing import ClassVar

from graphopt.passes.width.base import WidthPass
from graphopt.select.options import AllocateEvenly, Uniform


class PruneHidden(WidthPass):
    """Narrow the residual stream: the same dimensions go from the embedding, every projection and every norm.

    RMSNorm averages over the width, so its gain takes a factor sqrt(d / d') and its eps a factor d / d'; then the
    result equals the original with the removed dimensions written as zero everywhere. LayerNorm has no such fold, and
    models with it are declined.

    Scores: activation (Minitron, arXiv 2407.14679: outputs of all norms); magnitude; fluctuation
    (arXiv 2312.11983); taylor (arXiv 1906.10771); order.

    ```yaml
    - use: prune_hidden
      keep: 87.5%
      score: activation
      round: 8
    ```
    """

    name = "prune_hidden"
    dimensions: ClassVar[tuple[str, ...]] = ("hidden", "layers")

    allocate: AllocateEvenly = Uniform()
    """the stream is one view: `{kind: uniform, tolerance: ...}` states the tolerance"""

    @property
    def families(self) -> tuple[str, ...]:
        """The residual stream."""
        return ("hidden",)
