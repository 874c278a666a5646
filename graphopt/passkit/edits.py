"""Edits: what a plan says will be done, as data that prints, serialises and applies itself.

Each edit has two meanings that verification compares: `apply` is the surgery, `emulate` the same change on the
uncut graph (masked heads, averaged keys, a branch times zero).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const, MatMul, Sum, Take
from graphopt.passkit.training import Training
from graphopt.views import Atom, Block, Keep, Linear, Views, cut, find, indices, leaves, size_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Anchor:
    """A leaf by a place where it occurs: the `position`-th leaf of an axis of a weight. Stable, printable, JSON."""

    weight: str
    axis: int
    position: int

    @staticmethod
    def of(views: Views, leaf: Atom) -> Anchor:
        """An anchor of a leaf; raises PlanError when no weight holds it."""
        wanted = find(leaf)
        for name, axes in views.labels.weight_axes.items():
            for number, axis in enumerate(axes):
                for position, found in enumerate(leaves(axis)):
                    if found is wanted:
                        return Anchor(name, number, position)
        raise PlanError.of("no_weight", f"an axis of {leaf.size} runs through no weight")

    def leaf(self, views: Views) -> Atom:
        """The leaf that the anchor names in a program's views."""
        return list(leaves(views.labels.weight_axes[self.weight][self.axis]))[self.position]


class Edit:
    """One change. Subclasses are frozen dataclasses."""

    @property
    def candidate(self) -> str:
        """The candidate that this edit answers."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for people."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        raise NotImplementedError

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Do it."""
        raise NotImplementedError

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Do the same without surgery."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Cut(Edit):
    """Remove some units (heads, KV groups, neurons, hidden dimensions) of one view.

    `keep` lists what stays; when it is a table, row i belongs to index i of the leaf `by` (query heads of KV group i).
    `means` gives, per consuming product, the mean activation `[in features]` that compensates for what goes
    (FLAP, arXiv 2312.11983); `at` says where the emulation masks: at `consumers`, for the stream at `producers`, for experts
    at the `choices` of their router.
    """

    view: str
    unit: str
    anchor: Anchor
    keep: tuple[int, ...] | tuple[tuple[int, ...], ...]
    size: int
    by: Anchor | None = None
    at: str = "consumers"
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)
    score: str = ""

    @property
    def candidate(self) -> str:
        """The view and what is cut of it."""
        return f"{self.view}:{self.unit}"

    def kept(self) -> Keep:
        """The choice as the cutter takes it, without `by` resolved."""
        return Keep(np.asarray(self.keep, dtype=np.int64))

    def count(self) -> tuple[int, int]:
        """Units before and after."""
        table = np.asarray(self.keep)
        groups = table.shape[0] if table.ndim == 2 else 1
        return self.size * groups, int(table.size)

    def describe(self) -> str:
        """How many stay of how many."""
        before, after = self.count()
        bias = ", mean bias" if self.means else ""
        return f"{self.view}: keep {after} of {before} {self.unit}{bias}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "cut",
            "view": self.view,
            "unit": self.unit,
            "keep": [list(row) if isinstance(row, tuple) else row for row in self.keep],
            "of": self.size,
            "anchor": [self.anchor.weight, self.anchor.axis, self.anchor.position],
            "compensated": sorted(self.means),
        }

    def choice(self, views: Views) -> dict[Atom, Keep]:
        """The cut by leaf."""
        by = self.by.leaf(views) if self.by is not None else None
        return {find(self.anchor.leaf(views)): Keep(np.asarray(self.keep, dtype=np.int64), by)}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Cut alone; `apply_edits` merges all cuts of a plan into one."""
        self.compensate(rewriter, views)
        cut(rewriter, views.labels, self.choice(views))

    def compensate(self, rewriter: Rewriter, views: Views) -> None:
        """Add W[:, cut] mean[cut] to the bias of each consumer, before the weights are cut."""
        choice = self.choice(views)
        for linear in views.consumers(self.anchor.leaf(views)):
            mean = self.means.get(linear.node.name)
            if mean is None:
                continue
            axis = views.labels.weight_axes[linear.weight][linear.in_axis]
            kept = set(indices(axis, choice).tolist())
            gone = tuple(i for i in range(size_of(axis)) if i not in kept)
            if not gone:
                continue
            weight = rewriter.weights[linear.weight].expr
            lost = Const(mean[list(gone)], torch.float32)
            part = Take(weight, linear.in_axis, gone)
            if linear.in_axis == 1:
                add_bias(rewriter, linear, MatMul(part, lost, weight.dtype))
            else:
                add_bias(rewriter, linear, MatMul(lost, part, weight.dtype))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Mask what is cut (to its mean when compensated) on the whole graph."""
        choice = self.choice(views)
        leaf = self.anchor.leaf(views)
        if self.at == "producers":
            self._mask_stream(rewriter, views, leaf, choice)
            return
        if self.at == "choices":
            self._mask_choices(rewriter, views, choice)
            return
        for linear in views.consumers(leaf):
            axis = views.labels.weight_axes[linear.weight][linear.in_axis]
            mask = torch.zeros(size_of(axis), dtype=torch.float64)
            mask[torch.from_numpy(indices(axis, choice))] = 1
            node = rewriter.node(linear.reader)
            position = 1 if node.target is aten.addmm.default else 0
            x = node.args[position]
            masked = _times(rewriter, x, mask, f"mask.{self.unit}.{linear.node.name}", before=node)  # type: ignore[arg-type]
            mean = self.means.get(linear.node.name)
            if mean is not None:
                rest = (1 - mask) * mean.to(torch.float64)
                fill = rewriter.add_weight(f"mean.{self.unit}.{linear.node.name}", Const(rest, _dtype(x)), "constant")
                masked = rewriter.call(aten.add.Tensor, masked, fill, before=node)
            node.replace_input_with(x, masked)  # type: ignore[arg-type]

    def _mask_stream(self, rewriter: Rewriter, views: Views, leaf: Atom, choice: Mapping[Atom, Keep]) -> None:
        """Write zero into every weight at the removed dimensions, so that nothing puts a value there."""
        for name, axes in views.labels.weight_axes.items():
            today = rewriter.weight_node(name)
            for position, axis in enumerate(axes):
                if leaf not in leaves(axis):
                    continue
                mask = torch.zeros(size_of(axis), dtype=torch.float64)
                mask[torch.from_numpy(indices(axis, choice))] = 1
                mask = mask.reshape(-1, *[1] * (len(axes) - 1 - position))
                dtype = rewriter.weights[name].expr.dtype
                made = rewriter.add_weight(f"mask.{self.unit}.{position}.{name}", Const(mask, dtype), "constant")
                masked = rewriter.call(aten.mul.Tensor, today, made, after=made)
                rewriter.replace(today, masked, keep=partial(operator.is_, masked))
                today = masked

    def _mask_choices(self, rewriter: Rewriter, views: Views, choice: Mapping[Atom, Keep]) -> None:
        """Give what is removed the score minus infinity, so that no share goes there and it is never chosen."""
        ((leaf, keep),) = choice.items()
        for number, node in enumerate(views.labels.choices):
            axes = views.labels.of(node.args[0])  # type: ignore[arg-type]
            held = [i for i, axis in enumerate(axes) if leaf in leaves(axis)]
            if not held:
                continue
            rows = None if keep.by is None else [i for i, axis in enumerate(axes) if find(keep.by) in leaves(axis)]
            if rows is None or rows == held:
                gone = torch.ones(size_of(axes[held[0]]), dtype=torch.bool)
                gone[torch.from_numpy(indices(axes[held[0]], choice))] = False
            else:
                gone = torch.ones(keep.table.shape[0], size_of(axes[held[0]]), dtype=torch.bool)
                gone[torch.arange(len(gone))[:, None], torch.from_numpy(keep.table)] = False
            shape = [1] * len(axes)
            for i in {*held, *(rows or ())}:
                shape[i] = size_of(axes[i])
            today = rewriter.node(node)
            name = f"gone.{self.unit}.{number}.{self.candidate}"
            made = rewriter.add_weight(name, Const(gone.reshape(shape), torch.bool), "constant")
            masked = rewriter.call(aten.masked_fill.Scalar, today.args[0], made, -math.inf, before=today)
            today.args = (masked, *today.args[1:])


@dataclass(frozen=True, eq=False)
class Skip(Edit):
    """Remove sub-layers: the stream passes them by. `parts` are positions of the block's sub-layers, all when empty."""

    block: str
    index: int
    parts: tuple[int, ...] = ()
    why: str = ""

    @property
    def candidate(self) -> str:
        """The block, and the part of it."""
        return self.block + (f":{','.join(map(str, self.parts))}" if self.parts else "")

    def describe(self) -> str:
        """Which layer goes and why."""
        part = f" sub-layers {list(self.parts)}" if self.parts else ""
        return f"{self.block}: skip{part}" + (f" ({self.why})" if self.why else "")

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "skip", "block": self.block, "index": self.index, "parts": list(self.parts), "why": self.why}

    def _regions(self, views: Views) -> list[tuple[fx.Node, fx.Node]]:
        block = views.blocks[self.index]
        if not self.parts:
            # As one: sub-layers that only fold the batch and the length together have ends of two shapes.
            return [(block.entry, block.exit)]
        return [(block.sublayers[i].entry, block.sublayers[i].exit) for i in self.parts]

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Let readers of each exit read the entry."""
        for entry, exit in self._regions(views):
            rewriter.bypass(rewriter.node(exit), rewriter.node(entry))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """exit := entry + 0 * (exit - entry), with the branch still computed."""
        for entry, exit in self._regions(views):
            before, after = rewriter.node(entry), rewriter.node(exit)
            delta = rewriter.call(aten.sub.Tensor, after, before, after=after)
            nothing = rewriter.call(aten.mul.Tensor, delta, 0.0, after=delta)
            same = rewriter.call(aten.add.Tensor, before, nothing, after=nothing)
            after.replace_all_uses_with(same, delete_user_cb=lambda user, d=delta: user is not d)
            rewriter.forward(after, same)


@dataclass(frozen=True, eq=False)
class Train(Edit):
    """Weights that the train stage moves after all other edits; the graph stays, so that surgery does nothing."""

    training: Training
    parameters: int

    @property
    def candidate(self) -> str:
        """All weights are one candidate."""
        return "model:weights"

    def describe(self) -> str:
        """What is trained, on what, for how long."""
        recipe, losses = self.training.recipe, self.training.losses.model_dump(exclude_none=True, exclude_defaults=True)
        runs = f" x {recipe.accumulate}" if recipe.accumulate > 1 else ""
        how = f"LoRA of rank {self.training.lora.rank} on " if self.training.lora else ""
        teacher = f", taught by {self.training.teacher}" if self.training.teacher else ""
        return (
            f"train {how}{len(self.training.weights)} weights ({self.parameters:,} parameters) by {', '.join(losses)}"
            f"{teacher}: {recipe.steps} steps of {recipe.batch}{runs} x {recipe.seq} tokens"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "train", "parameters": self.parameters, **self.training.to_json()}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: weights move in the train stage."""

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing, as in `apply`: what is compared is the program before its weights move."""


@dataclass(frozen=True)
class Decline:
    """A candidate that a plan leaves alone, and why."""

    candidate: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Plain data for the trail."""
        return {"candidate": self.candidate, "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """Everything a pass wants to do: every candidate has an edit or a decline. `notes` go to the trail."""

    edits: tuple[Edit, ...]
    declines: tuple[Decline, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> Training | None:
        """What the train stage shall do after the edits; None when it has nothing to do."""
        return next((edit.training for edit in self.edits if isinstance(edit, Train)), None)


def apply_edits(program: Program, views: Views, edits: tuple[Edit, ...], by: str = "") -> Program:
    """Execute edits; decides nothing. Cuts are merged, because each is planned on the uncut axes."""
    rewriter = Rewriter(program)
    rewriter.by = by
    cuts = [edit for edit in edits if isinstance(edit, Cut)]
    choice: dict[Atom, Keep] = {}
    for edit in cuts:
        edit.compensate(rewriter, views)
    for edit in cuts:
        choice.update(edit.choice(views))
    if choice:
        cut(rewriter, views.labels, choice)
    for other in edits:
        if not isinstance(other, Cut):
            other.apply(rewriter, views)
    return rewriter.finish()


def emulate_edits(program: Program, views: Views, edits: tuple[Edit, ...], without: Iterable[Block] = ()) -> Program:
    """The same change without surgery: what the applied program must equal, `without` some blocks that the stream
    then passes by."""
    rewriter = Rewriter(program)
    for edit in edits:
        edit.emulate(rewriter, views)
    # After the emulation, whose nodes stand between blocks.
    for block in without:
        rewriter.bypass(rewriter.node(block.exit), rewriter.node(block.entry))
    return rewriter.finish()


def add_bias(rewriter: Rewriter, linear: Linear, delta: Any) -> None:
    """Add an expression `[out]` to a product's bias, which is created when there is none."""
    if linear.bias is not None:
        rewriter.set_weight(linear.bias, lambda expr: Sum((expr, delta)))
        return
    stem = linear.weight.removesuffix("weight")
    bias = rewriter.add_weight(f"{stem}bias" if stem != linear.weight else f"{linear.weight}_bias", delta)
    node = rewriter.node(linear.node)
    if node.target is aten.linear.default:
        node.args = (node.args[0], node.args[1], bias)
    else:
        made = rewriter.call(aten.add.Tensor, node, bias, after=node)
        rewriter.replace(node, made, keep=lambda user: user is made)


def _dtype(node: Any) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def _times(rewriter: Rewriter, x: fx.Node, mask: torch.Tensor, name: str, before: fx.Node) -> fx.Node:
    weight = rewriter.add_weight(name, Const(mask, _dtype(x)), "constant")
    return rewriter.call(aten.mul.Tensor, x, weight, before=before)
