"""Multi-head attention to grouped-query attention: fewer key-value heads, each shared by more query heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from graphopt.diagnostics import PlanError
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.spec.expr import Expr

if TYPE_CHECKING:
    import torch

    from graphopt.observe import Tap
    from graphopt.passes.attention.fold import Fold, Groups
    from graphopt.passes.attention.projections import Heads
    from graphopt.passes.attention.regroup import Regroup
    from graphopt.passkit.edits import Plan
    from graphopt.views import Attention


class RegroupKV(Pass):
    """Let more query heads share each key-value head: MHA to GQA or MQA, or GQA to fewer KV heads.

    The key and value projections shrink to `kv_heads` heads and with them the KV cache; query heads stay. `init: mean`
    averages the members of a group (GQA, arXiv 2305.13245), `first` keeps one of them, and `svd` takes the closest
    shared head by the calibrated keys and values and folds the way back into the query and output projections
    ("Effectively Compress KV Heads for LLM", arXiv 2406.07056). Under rotary embedding that fold is legal only when it
    commutes with the rotation: one complex weight for each head and frequency, features that do not turn keep the real
    fold. Errors are weighted by the queries and output columns that read them, which the paper does
    not do. Query heads are reordered where similar heads are grouped; this changes no result. Nothing new is computed,
    and a stock config says the outcome as `num_key_value_heads`.

    ```yaml
    - use: regroup_kv
      kv_heads: heads / 4
      init: svd
    ```
    """

    name: ClassVar[str] = "regroup_kv"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED, Fact.QUANTIZED})

    kv_heads: Expr
    """KV heads that stay, over heads, kv_heads and head_dim"""
    grouping: Literal["order", "similarity"] = "order"
    """which heads share: neighbours, or those whose calibrated keys and values have most in common"""
    init: Literal["mean", "first", "svd"] = "mean"
    """what the shared head is made of"""
    rope: Literal["auto", "commuting", "none"] = "auto"
    """whether the key fold must commute with rotary embedding; auto reads it off the graph"""
    weighting: Literal["readers", "none"] = "readers"
    """whether errors count by who reads them: keys by the calibrated queries, values by the output projection"""

    @property
    def calibrated(self) -> bool:
        """Whether keys and values have to be observed."""
        return self.init == "svd" or self.grouping == "similarity"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """Gram matrices of keys and values as the attention reads them.

        Products of two heads' features that turn by the same angle do not see the rotation, so that rotated keys serve.
        """
        from graphopt.observe import Tap

        if not self.calibrated:
            return ()
        taps = []
        for attention, count in self._chosen(context):
            if count is None:
                continue
            q, k, v = (str(node) for node in attention.core.args[:3])
            taps += [Tap(k, "gram", "heads"), Tap(v, "gram", "heads")]
            if self.weighting == "readers":
                taps.append(Tap(q, "gram", "heads"))
        return tuple(taps)

    def plan(self, context: Context) -> Plan:
        """An edit for each attention that can share, a decline for every other one."""
        from graphopt.passes.attention.projections import Unfit
        from graphopt.passkit.edits import Decline, Edit, Plan

        edits: list[Edit] = []
        declines: list[Decline] = []
        for attention, count in self._chosen(context):
            try:
                if count is None:
                    raise Unfit("outside where")
                edits.append(self._edit(context, attention, count))
            except Unfit as reason:
                declines.append(Decline(attention.path, str(reason)))
        if not context.views.attentions:
            declines.append(Decline("model", "the graph has no attention"))
        return Plan(tuple(edits), tuple(declines))

    def _chosen(self, context: Context) -> list[tuple[Attention, int | None]]:
        """All attentions with the KV heads that they shall have, None outside `where`."""
        layers = {a.core: block.index for block in context.views.blocks for a in block.attentions}
        found: list[tuple[Attention, int | None]] = []
        for attention in context.views.attentions:
            inside = context.covers(layers.get(attention.core, -1), attention.path)
            found.append((attention, self._count(attention) if inside else None))
        return found

    def _count(self, attention: Attention) -> int:
        sizes = {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
        count = self.kv_heads.integer(sizes)
        if not 1 <= count <= attention.kv_heads or attention.kv_heads % count:
            divisors = [n for n in range(1, attention.kv_heads + 1) if attention.kv_heads % n == 0]
            below = max((n for n in divisors if n <= count), default=1)
            raise PlanError.of(
                "head_count",
                f"regroup_kv cannot make {count} kv heads out of {attention.kv_heads}",
                notes=(
                    f"{attention.path}: {attention.heads} query heads, {attention.kv_heads} kv heads,"
                    f" head_dim {attention.head_dim}",
                    f"kv_heads that divide {attention.kv_heads}: {', '.join(map(str, divisors))}",
                ),
                help=(f"use kv_heads: {below}",),
            )
        return count

    def _edit(self, context: Context, attention: Attention, count: int) -> Regroup:
        from graphopt.passes.attention.projections import Unfit, find_heads
        from graphopt.passes.attention.regroup import Regroup

        if count == attention.kv_heads:
            raise Unfit(f"it already has {count} KV heads")
        if attention.cross and self.calibrated:
            raise Unfit("its keys come from another stream, which calibration does not observe; init: mean works")
        heads = find_heads(context.views, attention)
        if self.init != "first" and (heads.k.normed or heads.q.normed):
            raise Unfit(
                "its queries or keys are normalised after the projection, so that no weight makes a mix of several"
                " keys; init: first is legal"
            )
        pairs = self._pairs(heads)
        calibration = self._calibration(context, heads, pairs)
        groups = self._groups(heads, count, calibration)
        key_fold, value_fold = self._folds(heads, groups, calibration)
        edit = Regroup(attention.path, attention.core.name, groups, attention.heads, key_fold, value_fold, self.init)
        edit.check(context.views)
        return edit

    def _pairs(self, heads: Heads) -> torch.Tensor:
        """The features `[F, 2]` that the key fold must keep together."""
        from graphopt.passes.attention.projections import Unfit

        attention, pairs = heads.attention, heads.pairs
        if self.rope == "none" and len(pairs) and self.init == "svd":
            raise PlanError.of(
                "rope_fold",
                f"rope: none is not legal in {attention.path}, whose keys are turned by rotary embedding",
                notes=("a plain real fold of the key projection does not commute with the rotation",),
                help=("leave rope out, or use rope: commuting",),
            )
        if self.rope == "commuting" and not len(pairs):
            raise Unfit("it has no rotary embedding to commute with; leave rope out")
        if attention.positions == "rotary" and not len(pairs):
            raise Unfit("its rotary embedding was not recognised as graphopt::rotary")
        return pairs

    def _calibration(self, context: Context, heads: Heads, pairs: torch.Tensor) -> _Calibration | None:
        if not self.calibrated:
            return None
        statistics = context.statistics
        if statistics is None:
            asked = "init: svd" if self.init == "svd" else "grouping: similarity"
            raise PlanError.of(
                "no_calibration",
                f"regroup_kv with {asked} needs calibration text",
                help=("add calibration: {data: FILE, samples: 64, seq: 256}, or use init: mean and grouping: order",),
            )
        from graphopt.passes.attention.fold import output_cost, query_cost

        attention = heads.attention
        q, k, v = (str(node) for node in attention.core.args[:3])
        key_cost = value_cost = None
        if self.weighting == "readers":
            key_cost = query_cost(statistics.gram(q).gram, attention.kv_heads, attention.head_dim)
            value_cost = output_cost(context.program.weights, heads.o.linear, heads.o.rows, attention.kv_heads)
        return _Calibration(statistics.gram(k).gram, statistics.gram(v).gram, pairs, key_cost, value_cost)

    def _groups(self, heads: Heads, count: int, calibration: _Calibration | None) -> Groups:
        from graphopt.passes.attention.fold import order_groups, pair_losses, similar_groups

        attention, found, aligned = heads.attention, calibration, self.init == "svd"
        if self.grouping == "order" or found is None:
            return order_groups(attention.kv_heads, count)
        losses = pair_losses(found.keys, attention.head_dim, found.pairs, found.key_cost, aligned)
        losses = losses + pair_losses(found.values, attention.value_dim, found.pairs[:0], found.value_cost, aligned)
        return similar_groups(losses, count)

    def _folds(self, heads: Heads, groups: Groups, calibration: _Calibration | None) -> tuple[Fold, Fold]:
        from graphopt.passes.attention.fold import first_fold, mean_fold, svd_fold

        attention, found = heads.attention, calibration
        if self.init == "svd" and found is not None:
            return (
                svd_fold(found.keys, attention.head_dim, groups, found.pairs, found.key_cost),
                svd_fold(found.values, attention.value_dim, groups, found.pairs[:0], found.value_cost),
            )
        make = mean_fold if self.init == "mean" else first_fold
        return (
            make(attention.kv_heads, attention.head_dim, groups),
            make(attention.kv_heads, attention.value_dim, groups),
        )


@dataclass(frozen=True)
class _Calibration:
    """Gram matrices of all keys and values, the features that turn together, and what errors cost each head."""

    keys: torch.Tensor
    values: torch.Tensor
    pairs: torch.Tensor
    key_cost: torch.Tensor | None
    value_cost: torch.Tensor | None
