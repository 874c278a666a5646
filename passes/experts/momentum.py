"""Planning of momentum, and the edits that carry it from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.rewriter import Rewriter
from graphopt.passes.experts.add_momentum import AddMomentum
from graphopt.passkit import Context
from graphopt.passkit.edits import Decline, Edit, Plan
from graphopt.views import SubLayer, Views

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Momentum(Edit):
    """One expert layer's step: `entry` and `exit` name the stream before and after it, `branch` what it adds."""

    bank: str
    entry: str
    exit: str
    branch: str
    momentum: float
    step: float

    @property
    def candidate(self) -> str:
        """The bank."""
        return self.bank

    def describe(self) -> str:
        """The two numbers."""
        return f"{self.bank}: a step of {self.step:.4g} with momentum {self.momentum:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "momentum", "bank": self.bank, "momentum": self.momentum, "step": self.step}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """p = momentum * p + step * u, one sum behind the other."""
        exit, branch = rewriter.node(self.exit), rewriter.node(self.branch)
        taken = branch if self.step == 1 else rewriter.call(aten.mul.Tensor, branch, self.step, before=exit)
        carried = rewriter.shared.get("carried")
        if carried is not None and self.momentum != 0:
            before = rewriter.call(aten.mul.Tensor, carried, self.momentum, before=exit)
            taken = rewriter.call(aten.add.Tensor, before, taken, before=exit)
        exit.replace_input_with(branch, taken)
        rewriter.shared["carried"] = taken

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """step * sum over layers r up to this one of momentum^(s - r) u_r, from the outputs themselves."""
        exit, branch = rewriter.node(self.exit), rewriter.node(self.branch)
        outputs: list[fx.Node] = rewriter.shared.setdefault("outputs", [])
        outputs.append(branch)
        terms = [
            rewriter.call(aten.mul.Tensor, output, self.step * self.momentum**age, before=exit)
            for age, output in enumerate(reversed(outputs))
        ]
        total = terms[0]
        for term in terms[1:]:
            total = rewriter.call(aten.add.Tensor, total, term, before=exit)
        exit.replace_input_with(branch, total)


def plan(config: AddMomentum, context: Context) -> Plan:
    """A step for each bank whose sub-layer adds to the stream, in order; a reason for each other one."""
    views = context.views
    edits: list[Momentum] = []
    declines: list[Decline] = []
    width: Any = None
    for bank in views.experts:
        block = next((block for block in views.blocks if bank in block.experts), None)
        if block is None:
            declines.append(Decline(views.candidate(bank), "it lies outside the layers"))
            continue
        sublayer = next(s for s in block.sublayers if bank.down.node in s.nodes)
        branch = _branch(sublayer)
        if not (context.covers(block.index, bank.path) or context.covers(block.index, block.path)):
            reason: str | None = "outside `where`"
        elif branch is None:
            reason = "its sub-layer does not end in a plain sum with the stream"
        elif any(other.down.node in sublayer.nodes for other in views.experts if other is not bank):
            reason = "another bank adds to the stream at the same place"
        elif width not in (None, str(sublayer.exit.meta["val"].shape)):
            reason = "its stream has another shape than that of the layers before"
        elif config.momentum == 0 and config.step == 1:
            reason = "momentum 0 and step 1 are what it does"
        else:
            reason = None
        if reason is not None:
            declines.append(Decline(bank.path, reason))
            continue
        assert branch is not None
        width = str(sublayer.exit.meta["val"].shape)
        names = (sublayer.entry.name, sublayer.exit.name, branch.name)
        edits.append(Momentum(bank.path, *names, config.momentum, config.step))
    for one in views.unseen:
        if one.what.startswith("experts "):
            declines.append(Decline(one.what.partition(" ")[2], one.reason))
    if not edits and not declines:
        declines.append(Decline("model", "no bank of experts was found"))
    return Plan(tuple(edits), tuple(declines))


def _branch(sublayer: SubLayer) -> fx.Node | None:
    """What a sub-layer adds: the other term of the sum that it ends in; None when it ends otherwise."""
    exit = sublayer.exit
    if exit.target is not aten.add.Tensor or len(exit.args) != 2 or exit.kwargs:
        return None
    terms = [term for term in exit.args if term is not sublayer.entry]
    return terms[0] if len(terms) == 1 and isinstance(terms[0], fx.Node) else None
