"""Pruning of attention heads."""

from __future__ import annotations

from typing import ClassVar, Literal

from graphopt.passes.width.base import WidthPass
from graphopt.select.options import Account, Allocate, Compensate, Uniform


class PruneHeads(WidthPass):
    """Remove attention heads: their query (and key and value) rows and their columns of the output projection.

    With `unit: query` query heads go and keys and values stay; of the query heads that share a KV head the same number
    stays for each, so that grouped-query attention stays regular. In a model with one KV head a query head, the head
    goes with its keys and values. With `unit: kv_group` a KV head goes with all of its query heads, which makes
    the KV cache smaller. The result equals the original with the outputs of the removed heads set to zero, or to
    their mean with `compensate: mean_bias`.

    Scores: magnitude; fluctuation (FLAP, arXiv 2312.11983); activation (Minitron, arXiv 2407.14679); taylor
    (arXiv 1906.10771); order.

    ```yaml
    - use: prune_heads
      unit: kv_group
      keep: 75%
      score: {kind: fluctuation, metric: wifv}
      allocate: {kind: global, tolerance: 1%}
      compensate: mean_bias
      where: {layers: 1..-2}
    ```
    """

    name = "prune_heads"
    dimensions: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "layers")

    unit: Literal["query", "kv_group"] = "query"
    """query heads alone, or KV heads with their query heads"""
    allocate: Allocate = Uniform()
    """how the budget is divided over layers"""
    of: Account = "units"
    """what a global budget counts"""
    compensate: Compensate = "none"
    """what replaces the removed heads: nothing, or their mean as a bias of the output projection"""

    @property
    def families(self) -> tuple[str, ...]:
        """The one unit that was chosen."""
        return (self.unit,)
