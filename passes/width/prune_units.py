"""Pruning of heads and neurons out of one budget."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passes.width.base import WidthPass
from graphopt.select.options import Account, AllocatePool, Compensate, Fluctuation, Global, Score
from graphopt.spec import Expr, ScalarError


class PruneUnits(WidthPass):
    """Remove heads and neurons that compete in one pool: FLAP's AL-AM (arXiv 2312.11983).

    Scores are made comparable layer by layer (z-score), pooled over all layers and both kinds of units, and the best
    stay until their cost reaches `keep` of the pool; costs come from the weights of each unit, so that any head size
    and grouped-query attention work. What goes is replaced by its mean with `compensate: mean_bias`.

    ```yaml
    - use: prune_units
      units: [kv_group, neuron]
      keep: 80%
      score: {kind: fluctuation, metric: wifv}
      allocate: global
      compensate: mean_bias
    ```
    """

    name = "prune_units"
    dimensions: ClassVar[tuple[str, ...]] = ()

    units: Annotated[tuple[Literal["query", "kv_group", "neuron"], ...], Field(min_length=1)] = ("kv_group", "neuron")
    """which units share the budget"""
    score: Score = Fluctuation()
    """how units are ranked"""
    allocate: AllocatePool = Global()
    """one pool, or the same share of every view"""
    of: Account = "parameters"
    """what the budget counts"""
    compensate: Compensate = "none"
    """what replaces what goes: nothing, or its mean as a bias"""

    @property
    def families(self) -> tuple[str, ...]:
        """The units of the pool."""
        return self.units

    @model_validator(mode="after")
    def _check_units(self) -> PruneUnits:
        if len(set(self.units)) != len(self.units) or {"query", "kv_group"} <= set(self.units):
            raise ScalarError.about(
                "units_overlap", f"units {list(self.units)} overlap", help=("choose query or kv_group, and neuron",)
            )
        if self.keep is not None and isinstance(self.keep.value, Expr):
            raise ScalarError.about(
                "bad_unit", f"'{self.keep}' is no percentage of the pool", help=("write keep: 80%",)
            )
        return self
