"""Dense feed-forward to mixture of experts: the same neurons in groups, of which a router chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from graphopt.diagnostics import PlanError
from graphopt.passes.experts.options import (
    Choosing,
    Experts,
    Fitted,
    InOrder,
    KMeans,
    Masks,
    Partition,
    Random,
    Rank,
    Router,
    Static,
    Threshold,
    Tokens,
    Top,
    Trained,
    Zero,
)
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.spec import Percent

if TYPE_CHECKING:
    from graphopt.observe import Tap
    from graphopt.passes.experts.dense import Dense
    from graphopt.passes.experts.prepare import Prepared
    from graphopt.passes.experts.refactor import Refactor
    from graphopt.passes.experts.route import Route
    from graphopt.passkit.edits import Plan
    from graphopt.views import FeedForward


class RefactorMoE(Pass):
    """Make every dense feed-forward a bank of experts that hold its neurons, and let each token go to some of them.

    A feed-forward is a sum over its neurons, so that experts that share them out add up to it: with all experts chosen
    and equal weights the function stays what it was, biases included. Fewer chosen ones save the FLOPs of the others, and a
    token's result loses what these would have added. Experts are as wide as the widest; the others end in neurons of zero
    weight. A bank of which tokens choose by softmax weights that sum to 1 is what stock Mixtral configs say, and with
    `shared` neurons behind a `gate` what those of Qwen2-MoE do; they are saved as that.

    ```yaml
    - use: refactor_moe
      experts: 8
      partition: kmeans
      router: fitted
      choose: {kind: top, k: 4}
    ```
    """

    name: ClassVar[str] = "refactor_moe"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED, Fact.QUANTIZED})

    experts: Experts = 8
    """experts that each feed-forward becomes"""
    partition: Partition = InOrder()
    """which neurons an expert holds"""
    shared: Percent | None = None
    """share of the neurons, the most active ones on calibration text, that all tokens go through"""
    gate: bool = False
    """whether a gate of each token, at first 1, is on what all share: with it stock Qwen2-MoE configs say the result"""
    router: Router = Zero()
    """what the scores are made by"""
    choose: Choosing = Top()
    """which experts a token goes to"""
    weights: Literal["softmax", "one"] = "softmax"
    """what a chosen expert counts: its softmax weight among those chosen times their number, or 1"""
    unit: Literal["token", "sequence"] = "token"
    """what is routed: each token, or whole sequences by the mean of their tokens' scores, later tokens included"""

    def needs_calibration(self) -> bool:
        """Whether partition, router or shared neurons look at activations."""
        seen = not isinstance(self.partition, InOrder) or not isinstance(self.router, Zero | Random)
        return seen or self.shared is not None

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """Activations of the neurons: together, beside the inputs, by token or by sample."""
        from graphopt.observe import Tap
        from graphopt.passes.experts.prepare import tokens_of

        self._check()
        taps: list[Tap] = []
        tokens = tokens_of(context.program)
        for view in context.views.feed_forwards:
            if not self.needs_calibration() or not self._covers(context, view):
                continue
            hidden = view.down.x.name
            by_activity = isinstance(self.partition, KMeans) or isinstance(self.router, Fitted | Static)
            if by_activity or self.shared is not None:
                taps.append(Tap(hidden, "activity", "last", view.up.x.name))
            if isinstance(self.router, Trained):
                taps += [Tap(node, "rows") for node in (hidden, view.up.x.name)]
            if isinstance(self.partition, Masks):
                taps.append(Tap(hidden, "grouped"))
            if isinstance(self.router, Tokens) and tokens is not None:
                taps.append(Tap(hidden, "grouped", "last", tokens))
        return tuple(taps)

    def plan(self, context: Context) -> Plan:
        """An edit for each feed-forward that can be split, a decline for every other one and for banks that exist."""
        from graphopt.passes.experts.dense import Unfit, read_dense
        from graphopt.passes.experts.prepare import Prepared
        from graphopt.passkit.edits import Decline, Plan

        self._check()
        declines = [Decline(bank.path, "it is a bank of experts already") for bank in context.views.experts]
        fit: list[tuple[Dense, Prepared]] = []
        for view in context.views.feed_forwards:
            try:
                if not self._covers(context, view):
                    raise Unfit("outside where")
                dense = read_dense(context.views, view)
                prepared = Prepared.of(context, dense, self.experts, self.partition, self.shared)
                self._route(context).check(dense.x, context.program)
                fit.append((dense, prepared))
            except Unfit as reason:
                declines.append(Decline(view.path, str(reason)))
        if not context.views.feed_forwards and not context.views.experts:
            declines.append(Decline("model", "the graph has no feed-forward"))
        return Plan(self._edits(context, fit), tuple(declines))

    def _covers(self, context: Context, view: FeedForward) -> bool:
        block = next((b for b in context.views.blocks if view in b.feed_forwards), None)
        return context.covers(block.index if block is not None else -1, view.path)

    @property
    def _most(self) -> int:
        if isinstance(self.choose, Top):
            return self.choose.k if self.choose.k is not None else self.experts
        return self.choose.rank if isinstance(self.choose, Rank) else self.choose.most

    def _check(self) -> None:
        if self._most > self.experts:
            raise PlanError.of(
                "too_many_experts",
                f"refactor_moe cannot choose {self._most} of {self.experts} experts",
                help=(f"choose at most {self.experts}",),
            )
        whole = isinstance(self.choose, Top) and self._most == self.experts
        if isinstance(self.router, Zero) and not whole:
            raise PlanError.of(
                "scores_alike",
                "refactor_moe with router: zero gives all experts the same score, so that none can be preferred",
                help=("choose all experts: choose: top", "or take another router"),
            )
        if self.gate and self.shared is None and not isinstance(self.partition, Masks):
            raise PlanError.of(
                "nothing_shared",
                "refactor_moe has a gate on what all tokens share, but they share nothing",
                help=("give shared, such as shared: 25%",),
            )
        if isinstance(self.partition, Masks) and self.shared is not None:
            raise PlanError.of(
                "shared_twice",
                "refactor_moe with partition: masks shares the neurons that all domains keep, and no others",
                help=("leave shared out, or take another partition",),
            )

    def _route(self, context: Context) -> Route:
        from graphopt.passes.experts.route import Route

        choose = self.choose
        return Route(
            self.experts,
            self._most,
            choose.rank if isinstance(choose, Rank) else None,
            choose.least if isinstance(choose, Threshold) else None,
            self.weights == "softmax",
            self.unit == "sequence",
            context.program.dtype,
            isinstance(self.router, Tokens),
            self.gate,
        )

    def _edits(self, context: Context, fit: list[tuple[Dense, Prepared]]) -> tuple[Refactor, ...]:
        from graphopt.passes.experts.prepare import router_of
        from graphopt.passes.experts.refactor import Refactor

        route = self._route(context)
        routers = router_of(context, self.router, fit, route.count)
        return tuple(
            Refactor(
                dense.view.path,
                dense.view.down.node.name,
                prepared.groups,
                dense.view.neurons,
                route,
                self.partition.kind,
                router,
                prepared.shared,
                self.gate,
            )
            for (dense, prepared), router in zip(fit, routers, strict=True)
        )
