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


@dataclass(frozen=True, eq=False)
class ChooseHeads(Edit):
    """Let each token take `taken` of the units behind the first `shared`; `per_unit` heads make a unit.

    `source` names what the router reads (None: units are ranked by the norm of the queries); `reader` names the node that
    takes the heads' outputs in, side by side.
    """

    attention: str
    core: str
    reader: str
    units: int
    per_unit: int
    shared: int
    taken: int
    source: str | None

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.attention

    @property
    def routed(self) -> int:
        """Units that tokens choose among."""
        return self.units - self.shared

    def describe(self) -> str:
        """How many of how many."""
        what = "heads" if self.per_unit == 1 else f"groups of {self.per_unit} heads"
        by = "query norm" if self.source is None else "router"
        return (
            f"{self.attention}: each token takes {self.shared} shared and {self.taken} of {self.routed} {what}, by {by}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        by = "query_norm" if self.source is None else "router"
        sizes = {"units": self.units, "per_unit": self.per_unit, "shared": self.shared, "taken": self.taken}
        return {"edit": "choose_heads", "attention": self.attention, **sizes, "by": by}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Multiply what each head makes, `[B, H, S, D]`, by what it counts for the token."""
        core = rewriter.node(self.core)
        gates = _Gates(self, rewriter, core)
        gate = gates.call(aten.unsqueeze.default, gates.call(aten.transpose.int, gates.heads(), 1, 2), -1)
        made = rewriter.call(aten.mul.Tensor, core, gate, after=gate)
        reading = [user for user in core.users if user is not made and user not in gates.made]
        for user in reading:
            user.replace_input_with(core, made)
        rewriter.forward(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Multiply the features of each head where the output projection reads them."""
        core, reader = rewriter.node(self.core), rewriter.node(self.reader)
        x = reader.args[1 if reader.target is aten.addmm.default else 0]
        gate = _Gates(self, rewriter, core).heads()
        size = int(core.meta["val"].shape[-1])
        wide = rewriter.call(aten.repeat_interleave.self_int, gate, size, -1, before=reader)
        if x.meta["val"].dim() != 3:
            wide = rewriter.call(aten.flatten.using_ints, wide, 0, 1, before=reader)
        reader.replace_input_with(x, rewriter.call(aten.mul.Tensor, x, wide, before=reader))


class _Gates:
    """Nodes behind an attention's core that compute what each head counts for each token."""

    def __init__(self, edit: ChooseHeads, rewriter: Rewriter, core: fx.Node) -> None:
        self.edit, self.rewriter, self.core = edit, rewriter, core
        self.place = core.next
        self.made: set[fx.Node] = set()

    def call(self, target: Any, *args: Any) -> fx.Node:
        """A call right behind the core."""
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
        squares = call(aten.slice.Tensor, squares, -1, edit.shared, edit.units)
        best = call(operator.getitem, call(aten.topk.default, squares, edit.taken), 1)
        gate = call(aten.scatter.value, call(aten.zeros_like.default, squares), -1, best, 1.0)
        return call(aten.constant_pad_nd.default, gate, [edit.shared, 0], 1.0) if edit.shared else gate

    def _by_router(self) -> fx.Node:
        """Shares of the taken units times their number, and those of the shared ones, weighed against each other."""
        edit, call = self.edit, self.call
        scores = self._shares("router", edit.routed)
        best = call(aten.topk.default, scores, edit.taken)
        values, places = (call(operator.getitem, best, i) for i in (0, 1))
        if edit.taken > 1:
            values = call(aten.div.Tensor, values, call(aten.sum.dim_IntList, values, [-1], True))
            values = call(aten.mul.Tensor, values, float(edit.taken))
        else:
            # A single share divided by itself would teach the router nothing.
            values = call(aten.mul.Tensor, values, float(edit.routed))
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
    units = attention.kv_heads if grouped else attention.heads
    if units < 2:
        return "it has a single unit to choose"
    if attention.o is None or attention.o.x.meta["val"].shape[-1] != attention.heads * attention.value_dim:
        return "its heads are not read side by side by one product"
    if config.by == "router" and (attention.q is None or attention.q.x.meta["val"].dim() != 3):
        return "its queries come from no plain projection of the tokens, which a router could read"
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
    )
