"""Prunable units: heads, KV groups, neurons, experts and hidden dimensions, with every weight slice that goes with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import fx

from graphopt.views.atoms import Atom, Axis, Indices, coordinates, find, leaves
from graphopt.views.kinds import Block
from graphopt.views.model import Views
from graphopt.views.routing import Linear

FAMILIES = ("query", "kv_group", "neuron", "expert", "hidden")


@dataclass(frozen=True, eq=False)
class Occurrence:
    """One axis of one weight that units run through: `unit[i]` is the unit of index i, -1 for none."""

    weight: str
    axis: int
    unit: Indices


@dataclass(frozen=True, eq=False)
class Consumer:
    """A product that contracts over the units: `unit[j]` is the unit of its input feature j."""

    linear: Linear
    unit: Indices

    @property
    def x(self) -> str:
        """Name of the node that holds its input `[..., features]`."""
        return str(self.linear.x.name)

    @property
    def layout(self) -> Literal["last", "choices"]:
        """How tokens lie in that input: where each token chose its experts, it has a row for each of them."""
        return "last" if self.linear.index is None else "choices"


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """The units of one view along one dimension.

    `rows` x `per_row` units: query heads come in rows, one a KV group, of which equally many stay; everything else has
    one row. `parameters` is what one unit costs; `kv_width` how many cached features (keys and values) it holds a token;
    `least` how many of each row the choices among them need.
    """

    view: str
    family: str
    layer: int
    leaf: Atom
    by: Atom | None
    rows: int
    per_row: int
    occurrences: tuple[Occurrence, ...]
    consumers: tuple[Consumer, ...]
    parameters: int
    kv_width: int
    locked: tuple[str, ...]
    least: int = 1

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.rows * self.per_row


def unit_groups(views: Views, family: str) -> tuple[UnitGroup, ...]:
    """All groups of one family (`query`, `kv_group`, `neuron`, `expert`, `hidden`), in layer order.

    Views that share their weights are one group, that of the first of them.
    """
    found: list[UnitGroup] = []
    seen: set[tuple[Atom, Atom | None]] = set()

    def add(path: str, block: Block | None, leaf: Atom | None, by: Atom | None = None) -> None:
        if leaf is None:
            return
        key = (find(leaf), find(by) if by is not None else None)
        if key not in seen:
            seen.add(key)
            found.append(_group(views, path, family, block, *key))

    for block in views.blocks:
        for attention in block.attentions if family in ("query", "kv_group") else ():
            grouped = family == "query" and attention.heads != attention.kv_heads
            leaf, by = (attention.query_group, attention.kv_group) if grouped else (attention.kv_group, None)
            # One KV head is shared by all query heads, which then are rows of one table.
            by = None if by is not None and by.size == 1 else by
            add(attention.path, block, leaf, by)
        if family == "neuron":
            for dense in block.feed_forwards:
                add(dense.path, block, dense.neuron)
            for bank in block.experts:
                add(bank.path, block, bank.neuron)
        for experts in block.experts if family == "expert" else ():
            add(experts.path, block, experts.expert, experts.expert_group)
    if family == "hidden":
        stacks = {block.stack: block for block in reversed(views.blocks)}
        for stack, block in sorted(stacks.items()):
            name = "residual" if len(stacks) == 1 else f"residual {stack}"
            for leaf in dict.fromkeys(leaves(views.labels.of(block.entry)[-1])):
                add(name, None, leaf)
    return tuple(found)


def _group(views: Views, path: str, family: str, block: Block | None, leaf: Atom, by: Atom | None) -> UnitGroup:
    rows = by.size if by is not None else 1

    def unit_of(axis: Axis) -> Indices:
        inner = coordinates(axis, leaf)
        if by is None:
            return inner
        outer = coordinates(axis, by)
        return np.where((inner >= 0) & (outer >= 0), outer * leaf.size + inner, -1)

    occurrences, parameters = [], 0
    for name, axes in views.labels.weight_axes.items():
        numel = 1
        for size in views.program.weights[name].expr.shape:
            numel *= size
        for position, axis in enumerate(axes):
            if leaf in leaves(axis):
                unit = unit_of(axis)
                occurrences.append(Occurrence(name, position, unit))
                if views.program.weights[name].kind == "parameter":
                    parameters += numel * int((unit >= 0).sum()) // len(unit) // (rows * leaf.size)
    consumers = tuple(
        Consumer(linear, unit_of(views.labels.weight_axes[linear.weight][linear.in_axis]))
        for linear in views.consumers(leaf)
    )
    kv_width = 0
    for attention in views.attentions:
        if attention.kv_group is not None and find(attention.kv_group) is leaf:
            kv_width += attention.head_dim + attention.value_dim
    return UnitGroup(
        view=path,
        family=family,
        layer=block.index if block is not None else -1,
        leaf=leaf,
        by=by,
        rows=rows,
        per_row=leaf.size,
        occurrences=tuple(occurrences),
        consumers=consumers,
        parameters=parameters,
        kv_width=kv_width,
        locked=tuple(views.labels.locks.get(leaf, ())),
        least=_least(views, leaf, by),
    )


def _least(views: Views, leaf: Atom, by: Atom | None) -> int:
    """How many units of each row a router must be left with: as many as it chooses, of the rows that it chooses first."""
    inside: list[tuple[int, bool]] = []
    rows = by.size if by is not None else 1
    for node, dim in views.labels.choices.items():
        number = _chosen(node)
        found = set(leaves(views.labels.of(node.args[0])[dim])) if number is not None else set()  # type: ignore[arg-type]
        if number is not None and leaf in found:
            inside.append((number, by in found))
        elif number is not None and by in found:
            rows = min(rows, number)
    return max((-(-number // rows) if among_rows else number for number, among_rows in inside), default=1)


def _chosen(node: fx.Node) -> int | None:
    """How many entries a node chooses; None when it shares out among all."""
    if node.target is torch.ops.aten.topk.default:
        return int(node.args[1])  # type: ignore[arg-type]
    return 1 if node.target is torch.ops.aten.argmax.default else None
