"""Planning of mixtures of heads, and the edit that makes each token choose its heads."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const
from graphopt.passes.attention.mix_heads import MixHeads
from graphopt.passkit import Context
from graphopt.passkit.edits import Decline, Edit, Plan
from graphopt.views import Attention, Views

aten = torch.ops.aten
_ALL = 2**63 - 1
# A logit that leaves nothing of a key: others lie no 100 apart where a softmax in float32 still tells them from 0.
_HIDDEN = -1e4


@dataclass(frozen=True, eq=False)
class ChooseHeads(Edit):
    """Let each token take `taken` of the units behind the first `shared`; `per_unit` heads make a unit.

    `source` names what the router reads (None: units are ranked by the norm of the queries); `reader` names the node that
    takes the heads' outputs in, side by side. `routed` hides the keys of a unit from it that belong to tokens which did not
    take it; `pooled` lets sequences choose, not tokens.
    """

    attention: str
    core: str
    reader: str
    units: int
    per_unit: int
    shared: int
    taken: int
    source: str | None
    routed: bool = False
    pooled: bool = False

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.attention

    @property
    def choices(self) -> int:
        """Units that tokens choose among."""
        return self.units - self.shared

    def describe(self) -> str:
        """How many of how many."""
        what = "heads" if self.per_unit == 1 else f"groups of {self.per_unit} heads"
        by = "query norm" if self.source is None else "router"
        unit = "sequence" if self.pooled else "token"
        among = ", and sees those that took them" if self.routed else ""
        return (
            f"{self.attention}: each {unit} takes {self.shared} shared and {self.taken} of {self.choices} {what}, by {by}"
            f"{among}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        by = "query_norm" if self.source is None else "router"
        sizes = {"units": self.units, "per_unit": self.per_unit, "shared": self.shared, "taken": self.taken}
        how = {"by": by, "routed": self.routed, "pooled": self.pooled}
        return {"edit": "choose_heads", "attention": self.attention, **sizes, **how}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Multiply what each head makes, `[B, H, S, D]`, by what it counts for the token."""
        core = rewriter.node(self.core)
        gates = _Gates(self, rewriter, core)
        gate = gates.call(aten.unsqueeze.default, gates.call(aten.transpose.int, gates.heads(), 1, 2), -1)
        if self.routed:
            gates.hide(gate)
        made = rewriter.call(aten.mul.Tensor, core, gate, after=core)
        reading = [user for user in core.users if user is not made and user not in gates.made]
        for user in reading:
            user.replace_input_with(core, made)
        rewriter.forward(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Multiply the features of each head where the output projection reads them."""
        core, reader = rewriter.node(self.core), rewriter.node(self.reader)
        x = reader.args[1 if reader.target is aten.addmm.default else 0]
        gates = _Gates(self, rewriter, core)
        gate = gates.heads()
        if self.routed:
            gates.mask(gate)
        size = int(core.meta["val"].shape[-1])
        wide = rewriter.call(aten.repeat_interleave.self_int, gate, size, -1, before=reader)
        if x.meta["val"].dim() != 3:
            wide = rewriter.call(aten.flatten.using_ints, wide, 0, 1, before=reader)
        reader.replace_input_with(x, rewriter.call(aten.mul.Tensor, x, wide, before=reader))


class _Gates:
    """Nodes before an attention's core that compute what each head counts for each token, and what it may see."""

    def __init__(self, edit: ChooseHeads, rewriter: Rewriter, core: fx.Node) -> None:
        self.edit, self.rewriter, self.core = edit, rewriter, core
        self.place = core
        self.made: set[fx.Node] = set()

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call right before the core."""
        made = self.rewriter.call(target, *args, before=self.place)
        self.made.add(made)
        return made

    def heads(self) -> fx.Node:
        """`[B, S, heads]`."""
        edit = self.edit
        gate = self._by_norm() if edit.source is None else self._by_router()
        return gate if edit.per_unit == 1 else self.call(aten.repeat_interleave.self_int, gate, edit.per_unit, -1)

    def _by_norm(self) -> fx.Node:
        """1 for units that are shared or have the largest query norms, else 0."""
        edit, call = self.edit, self.call
        q = self.core.args[0]
        squares = call(aten.transpose.int, call(aten.sum.dim_IntList, call(aten.mul.Tensor, q, q), [-1]), 1, 2)
        if edit.per_unit > 1:
            rows = call(aten.unflatten.int, squares, -1, [edit.units, edit.per_unit])
            squares = call(aten.sum.dim_IntList, rows, [-1])
        squares = self._pooled(call(aten.slice.Tensor, squares, -1, edit.shared, edit.units))
        best = call(operator.getitem, call(aten.topk.default, squares, edit.taken), 1)
        gate = call(aten.scatter.value, call(aten.zeros_like.default, squares), -1, best, 1.0)
        return call(aten.constant_pad_nd.default, gate, [edit.shared, 0], 1.0) if edit.shared else gate

    def _by_router(self) -> fx.Node:
        """Shares of the taken units times their number, and those of the shared ones, weighed against each other."""
        edit, call = self.edit, self.call
        scores = self._pooled(self._shares("router", edit.choices))
        best = call(aten.topk.default, scores, edit.taken)
        values, places = (call(operator.getitem, best, i) for i in (0, 1))
        if edit.taken > 1:
            values = call(aten.div.Tensor, values, call(aten.sum.dim_IntList, values, [-1], True))
            values = call(aten.mul.Tensor, values, float(edit.taken))
        else:
            # A single share divided by itself would teach the router nothing.
            values = call(aten.mul.Tensor, values, float(edit.choices))
        gate = call(aten.scatter.src, call(aten.zeros_like.default, scores), -1, places, values)
        if not edit.shared:
            return gate
        both = call(aten.mul.Tensor, self._shares("balance", 2), 2.0)
        ours, theirs = (call(aten.slice.Tensor, both, -1, i, i + 1) for i in (0, 1))
        if edit.shared > 1:
            ours = call(
                aten.mul.Tensor, call(aten.mul.Tensor, self._shares("shared", edit.shared), float(edit.shared)), ours
            )
        return call(aten.cat.default, [ours, call(aten.mul.Tensor, gate, theirs)], -1)

    def _pooled(self, scores: fx.Node) -> fx.Node:
        """Scores `[B, S, units]` of tokens, or for all of a sequence their mean over those that are no padding."""
        if not self.edit.pooled:
            return scores
        call, rewriter = self.call, self.rewriter
        spec = next((spec for spec in rewriter.program.entry.inputs if spec.role == "padding"), None)
        if spec is None:
            mean = call(aten.mean.dim, scores, [1], True)
        else:
            real = call(aten.to.dtype, rewriter.input_node(spec.name), self.core.meta["val"].dtype)
            real = call(aten.unsqueeze.default, real, -1)
            total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, scores, real), [1], True)
            mean = call(aten.div.Tensor, total, call(aten.sum.dim_IntList, real, [1], True))
        return call(aten.expand_as.default, mean, scores)

    def hide(self, gate: fx.Node) -> None:
        """Give keys a feature that no query outweighs where their token did not take the head; `gate` is `[B, H, S, 1]`."""
        call, core = self.call, self.core
        q, k = core.args[:2]
        value = k.meta["val"]  # type: ignore[union-attr]
        share = int(q.meta["val"].shape[1]) // int(value.shape[1])  # type: ignore[union-attr]
        taken = call(aten.slice.Tensor, gate, 1, 0, _ALL, share) if share > 1 else gate
        taken = call(aten.to.dtype, call(aten.gt.Scalar, taken, 0), value.dtype)
        low = max(_HIDDEN / float(core.args[5]), torch.finfo(value.dtype).min / 2)  # type: ignore[arg-type]
        mark = call(aten.mul.Tensor, call(aten.rsub.Scalar, taken, 1), low)
        core.replace_input_with(k, call(aten.cat.default, [k, mark], -1))  # type: ignore[arg-type]
        core.replace_input_with(q, call(aten.constant_pad_nd.default, q, [0, 1], 1.0))  # type: ignore[arg-type]

    def mask(self, gate: fx.Node) -> None:
        """The same as visibility `[B, H, S, S]`, for `gate` `[B, S, H]`; who did not take a head sees what it saw."""
        call, core, given = self.call, self.core, self.core.args[3]
        taken = call(aten.gt.Scalar, call(aten.transpose.int, gate, 1, 2), 0)
        query = call(aten.logical_not.default, call(aten.unsqueeze.default, taken, 3))
        seen = call(aten.logical_or.default, query, call(aten.unsqueeze.default, taken, 2))
        if isinstance(given, fx.Node):
            value = given.meta["val"]
            if value.dtype.is_floating_point:
                hidden = call(aten.logical_not.default, seen)
                seen = call(aten.masked_fill.Scalar, given, hidden, torch.finfo(value.dtype).min)
            else:
                if value.dim() == 2:
                    given = call(aten.unsqueeze.default, call(aten.unsqueeze.default, given, 1), 1)
                seen = call(aten.logical_and.default, seen, call(aten.to.dtype, given, torch.bool))
        core.args = (*core.args[:3], seen, *core.args[4:])

    def _shares(self, name: str, size: int) -> fx.Node:
        """A softmax of a new product of the token, `[B, S, size]`, whose weight is zero."""
        source = self.rewriter.node(str(self.edit.source))
        value = source.meta["val"]
        zeros = Const(torch.zeros(size, int(value.shape[-1]), dtype=value.dtype), value.dtype)
        weight = self.rewriter.add_weight(f"{self.edit.attention}.head_{name}.weight", zeros)
        return self.call(aten.softmax.int, self.call(aten.linear.default, source, weight), -1)


def plan(config: MixHeads, context: Context) -> Plan:
    """A choice of heads or a decline for every attention."""
    edits: list[Edit] = []
    declines: list[Decline] = []
    for attention in context.views.attentions:
        made = _edit(config, context, attention)
        if isinstance(made, str):
            declines.append(Decline(context.views.candidate(attention), made))
        else:
            edits.append(made)
    if not edits and not declines:
        declines.append(Decline("model", "no attention was found"))
    return Plan(tuple(edits), tuple(declines))


def _edit(config: MixHeads, context: Context, attention: Attention) -> ChooseHeads | str:
    """The edit of an attention, or why it is left alone."""
    views, core = context.views, attention.core
    block = next((block for block in views.blocks if attention in block.attentions), None)
    if block is None:
        return "it lies outside the layers"
    if not (context.covers(block.index, attention.path) or context.covers(block.index, block.path)):
        return "outside `where`"
    grouped = config.unit == "kv_group"
    units = config.experts or (attention.kv_heads if grouped else attention.heads)
    if attention.heads % units:
        return f"its {attention.heads} heads make no {units} groups of equal size"
    if units < 2:
        return "it has a single unit to choose"
    if attention.o is None or attention.o.x.meta["val"].shape[-1] != attention.heads * attention.value_dim:
        return "its heads are not read side by side by one product"
    if config.by == "router" and (attention.q is None or attention.q.x.meta["val"].dim() != 3):
        return "its queries come from no plain projection of the tokens, which a router could read"
    if config.attends == "routed" and (reason := _shows_all(attention, units)) is not None:
        return reason
    if config.each == "sequence" and attention.o.reader.meta["val"].dim() != 3:
        return "its tokens are in no order of sequences that could choose"
    sizes = {"heads": attention.heads, "kv_heads": attention.kv_heads, "layers": len(views.blocks)}
    keep = round(config.keep.of(units, sizes))
    shared = round(config.shared.of(units, sizes)) if config.shared is not None else 0
    if shared >= keep:
        raise PlanError.of(
            "no_choice",
            f"{attention.path} would share {shared} of the {keep} units that count for a token, which leaves no choice",
            help=("keep more, or share fewer",),
        )
    if keep == units and config.by == "query_norm":
        return f"keeps all {units}"
    source = attention.q.x.name if config.by == "router" and attention.q is not None else None
    return ChooseHeads(
        attention.path,
        core.name,
        attention.o.reader.name,
        units,
        attention.heads // units,
        shared,
        keep - shared,
        source,
        config.attends == "routed",
        config.each == "sequence",
    )


def _shows_all(attention: Attention, units: int) -> str | None:
    """Why the keys of an attention cannot be hidden by unit."""
    core = attention.core
    if core.target is not torch.ops.graphopt.attention.default:
        return "its heads are bounded, and cannot hide the tokens of others as well"
    if attention.cross:
        return "its keys are those of another text, whose tokens take no heads"
    if attention.kv_heads % units:
        return f"its {attention.kv_heads} KV heads make no {units} groups of equal size, each with keys of its own"
    return "its scores are capped, so that no key can be hidden" if core.args[8] is not None else None
