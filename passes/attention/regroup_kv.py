"""Multi-head attention to grouped-query attention: fewer key-value heads, each shared by more query heads."""

from __future__ import annotations

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

_DIMENSIONS = ("heads", "kv_heads", "head_dim")


class RegroupKV(Pass):
    """Let more query heads share each key-value head: MHA to GQA or MQA, or GQA to fewer KV heads.

    The key and value projections shrink to `kv_heads` heads and with them the KV cache; query heads stay. `init: mean`
    averages the members of a group (GQA, arXiv 2305.13245), `first` keeps one of them, and `svd` takes the closest
    shared head by the calibrated keys and values and folds the way back into the query and output projections
    ("Effectively Compress KV Heads for LLM", arXiv 2406.07056). Under rotary embedding that fold is legal only when it
    commutes with the rotation: one complex weight for each head and frequency, features that do not turn keep the real
    fold. Query heads are reordered where similar heads are grouped; this changes nothing. The result needs no new
    operation, and a stock config says it as `num_key_value_heads`.

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
    weighting: Literal["none", "queries"] = "none"
    """svd: count an error in a key by the size of the queries that meet it, or all alike"""

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
            if self.weighting == "queries":
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
            raise Unfit("its keys come from another stream, which calibration does not observe; use init: mean or first")
        heads = find_heads(context.views, attention)
        if self.init != "first" and (heads.k.normed or heads.q.normed):
            raise Unfit(
                "its queries or keys are normalised after the projection, so that no weight makes a mix of several keys;"
                " init: first is legal"
            )
        pairs = self._pairs(heads)
        keys, values = self._grams(context, attention)
        groups = self._groups(heads, count, pairs, keys, values)
        key_fold, value_fold = self._folds(context, heads, groups, pairs, keys, values)
        edit = Regroup(
            attention.path, attention.core.name, groups, attention.heads, key_fold, value_fold, self.init
        )
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

    def _grams(self, context: Context, attention: Attention) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.calibrated:
            return None, None
        if context.statistics is None:
            asked = "init: svd" if self.init == "svd" else "grouping: similarity"
            raise PlanError.of(
                "no_calibration",
                f"regroup_kv with {asked} needs calibration text",
                help=("add calibration: {data: FILE, samples: 64, seq: 256}, or use init: mean and grouping: order",),
            )
        _, k, v = (str(node) for node in attention.core.args[:3])
        return context.statistics.gram(k).gram, context.statistics.gram(v).gram

    def _groups(
        self,
        heads: Heads,
        count: int,
        pairs: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> Groups:
        from graphopt.passes.attention.fold import order_groups, similar_groups, similarity

        attention = heads.attention
        if self.grouping == "order" or keys is None or values is None:
            return order_groups(attention.kv_heads, count)
        aligned = self.init == "svd"
        likeness = similarity(keys, attention.head_dim, pairs, aligned)
        likeness = likeness + similarity(values, attention.value_dim, pairs[:0], aligned)
        return similar_groups(likeness / 2, count)

    def _folds(
        self,
        context: Context,
        heads: Heads,
        groups: Groups,
        pairs: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> tuple[Fold, Fold]:
        from graphopt.passes.attention.fold import first_fold, mean_fold, svd_fold

        attention = heads.attention
        count, width, value_width = attention.kv_heads, attention.head_dim, attention.value_dim
        if self.init == "svd" and keys is not None and values is not None:
            weight = self._query_weight(context, attention) if self.weighting == "queries" else None
            return svd_fold(keys, width, groups, pairs, weight), svd_fold(values, value_width, groups, pairs[:0])
        make = mean_fold if self.init == "mean" else first_fold
        return make(count, width, groups), make(count, value_width, groups)

    def _query_weight(self, context: Context, attention: Attention) -> torch.Tensor:
        """Sum of q q^T over the query heads of each KV head, `[K, D, D]`."""
        assert context.statistics is not None
        gram = context.statistics.gram(str(attention.core.args[0])).gram
        each, width = attention.heads // attention.kv_heads, attention.head_dim
        table = gram.reshape(attention.kv_heads, each, width, attention.kv_heads, each, width)
        return table.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).sum(-1).permute(2, 0, 1)
