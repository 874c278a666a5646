"""Planning of the width passes: find the units, score them, divide the budget, write the cuts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from graphopt.diagnostics import PlanError
from graphopt.ir.rewriter import Rewriter
from graphopt.observe import Tap
from graphopt.passes.width.base import WidthPass
from graphopt.passkit.base import Context
from graphopt.passkit.edits import Anchor, Cut, Decline, Plan
from graphopt.select import compensate
from graphopt.select.allocate import Budget, Candidate, check_units, explicit, pooled, uniform
from graphopt.select.options import Explicit, Global, PerLayer
from graphopt.select.score import score
from graphopt.select.score import taps as score_taps
from graphopt.views import Attention, Experts, FeedForward, Keep, UnitGroup, Views, cut, leaves, unit_groups

Table = tuple[int, ...] | tuple[tuple[int, ...], ...]


def taps(config: WidthPass, context: Context) -> tuple[Tap, ...]:
    """Statistics for every group that may be cut."""
    groups, _ = candidates(config, context)
    found: dict[Tap, None] = {}
    for group in groups:
        found.update(dict.fromkeys(score_taps(group, context.views, config.score)))
        if config.compensation == "mean_bias":
            found.update(dict.fromkeys(compensate.mean_taps(group)))
    return tuple(found)


def plan(config: WidthPass, context: Context) -> Plan:
    """Cuts and declines for every view of the model, with the budget in the notes.

    Raises BudgetError when the budget cannot be met, PlanError when the options do not fit the model.
    """
    groups, declines = candidates(config, context)
    edits: list[Cut] = []
    notes: dict[str, Any] = {"score": config.score.model_dump(mode="json")}
    if groups:
        chosen, budget = _choose(config, context, groups)
        notes["budget"] = budget.to_json()
        for group, keep in zip(groups, chosen, strict=True):
            if keep is None:
                declines.append(Decline(_name(group), "not listed"))
            elif np.asarray(keep).size == group.units:
                declines.append(Decline(_name(group), f"keeps all {group.units}"))
            else:
                edits.append(_cut(config, context, group, keep))
    return Plan(tuple(edits), tuple(declines), notes)


def candidates(config: WidthPass, context: Context) -> tuple[list[UnitGroup], list[Decline]]:
    """The groups that may be cut, and for every other view why not."""
    groups: list[UnitGroup] = []
    declines: list[Decline] = []
    for family in config.families:
        found = unit_groups(context.views, family)
        for group in found:
            reason = _reason(config, context, group)
            if reason is None:
                groups.append(group)
            else:
                declines.append(Decline(_name(group), reason))
        declines.extend(_missing(context.views, family, {group.view for group in found}))
    return groups, declines


def _reason(config: WidthPass, context: Context, group: UnitGroup) -> str | None:
    views = context.views
    if group.family == "hidden":
        if context.paths or len(context.layers) != len(views.blocks):
            raise PlanError.of(
                "where_hidden",
                "the residual stream runs through all layers, so its width cannot differ between them",
                help=("leave `where` out of this step",),
            )
    elif not _covers(context, group):
        return "outside `where`"
    if group.locked:
        return group.locked[0]
    if group.units < 2:
        return "it has a single unit"
    if config.compensation == "mean_bias" and any(consumer.linear.bank for consumer in group.consumers):
        return "each expert would need a mean and a bias of its own; compensate: none works"
    if group.family == "hidden":
        return _refusal(views, group)
    for node, axis in views.labels.norms.items():
        if group.leaf in leaves(axis):
            return f"the norm at {node.meta.get('path', node.name)} averages over it, so that a cut changes what stays"
    return None


def _covers(context: Context, group: UnitGroup) -> bool:
    path = context.views.blocks[group.layer].path
    return context.covers(group.layer, group.view) or context.covers(group.layer, path)


def _refusal(views: Views, group: UnitGroup) -> str | None:
    """Why the cutter refuses this axis, tried on a copy of the graph."""
    try:
        cut(Rewriter(views.program), views.labels, {group.leaf: Keep(np.arange(group.units - 1))})
    except PlanError as error:
        return error.diagnostics[0].message
    return None


def _missing(views: Views, family: str, seen: set[str]) -> list[Decline]:
    """Declines for views that have no such unit."""
    if family == "hidden":
        return [] if seen else [Decline("residual:hidden", "no residual stream was found")]
    if family == "expert":
        parts = [(bank.path, _outside(views, bank)) for bank in views.experts]
        parts += [(one.what.partition(" ")[2], one.reason) for one in views.unseen if one.what.startswith("experts ")]
    elif family == "neuron":
        parts = [(dense.path, _outside(views, dense)) for dense in views.feed_forwards]
        parts += [(bank.path, _outside(views, bank)) for bank in views.experts]
        missed = [one for one in views.unseen if one.what.startswith(("feed-forward ", "experts "))]
        parts += [(one.what.partition(" ")[2], one.reason) for one in missed]
    else:
        parts = [(view.path, _no_heads(views, view, family)) for view in views.attentions]
    if not parts:
        what = {"neuron": "feed-forward of more than one neuron", "expert": "bank of experts"}.get(family, "attention")
        return [Decline(f"model:{family}", f"no {what} was found")]
    return [Decline(f"{path}:{family}", reason) for path, reason in parts if path not in seen]


def _outside(views: Views, view: FeedForward | Experts) -> str:
    inside = any(view in (*block.feed_forwards, *block.experts) for block in views.blocks)
    return "it shares its weights with one that came before" if inside else "it lies outside the blocks"


def _no_heads(views: Views, view: Attention, family: str) -> str:
    if view.kv_heads == 1 and family == "kv_group":
        return "it has a single KV head"
    if view.kv_group is not None and any(view in block.attentions for block in views.blocks):
        return "its heads are those of an attention that came before: weights or a bias a head join them"
    return "its heads are no free axis of the graph, or it lies outside the blocks"


def _choose(config: WidthPass, context: Context, groups: list[UnitGroup]) -> tuple[list[Table | None], Budget]:
    allocate = config.allocation
    if isinstance(allocate, Explicit):
        return _explicit(allocate, context, groups)
    pool = isinstance(allocate, Global)
    views = [_candidate(config, context, group, pool) for group in groups]
    if not any(view.cost for view in views):
        raise PlanError.of(
            "costless",
            f"these units hold no {config.account}, so a budget of {config.account} says nothing about them",
            help=("count units or parameters instead", "KV bytes go with unit: kv_group"),
        )
    tolerance = allocate.tolerance.fraction
    if isinstance(allocate, Global):
        counts = pooled(views, tolerance, allocate.minimum, config.account)
    else:
        counts = uniform(views, tolerance)
    budget = Budget(
        config.account,
        sum((view.cost * view.target for view in views), Fraction(0)),
        sum(view.cost * view.rows * count for view, count in zip(views, counts, strict=True)),
        sum(view.cost * view.units for view in views),
    )
    return [view.keep(count) for view, count in zip(views, counts, strict=True)], budget


def _candidate(config: WidthPass, context: Context, group: UnitGroup, pool: bool) -> Candidate:
    allocate = config.allocation
    normalise = allocate.normalise if isinstance(allocate, Global) and pool else "none"
    scores = score(group, context.views, context.statistics, config.score, normalise)
    return Candidate(
        _name(group),
        scores.numpy(),
        group.rows,
        group.per_row,
        cost(config.account, group, context.views),
        _target(config, context, group),
        config.round,
        group.least,
    )


def _target(config: WidthPass, context: Context, group: UnitGroup) -> Fraction:
    amount = config.keep
    allocate = config.allocation
    if isinstance(allocate, PerLayer):
        if len(allocate.keep) != len(context.layers):
            raise PlanError.of(
                "per_layer_length",
                f"allocate lists {len(allocate.keep)} layers, but the step is about {len(context.layers)}",
                help=("give one amount for each layer that `where` selects",),
            )
        amount = allocate.keep[context.layers.index(group.layer)]
    if amount is None:
        raise PlanError.of("no_budget", "keep is missing: how much stays?", help=("write keep: 75%",))
    return amount.of(group.units, sizes(context.views, group))


def sizes(views: Views, group: UnitGroup) -> dict[str, int]:
    """The dimensions of a view that an expression may use."""
    found = {"layers": len(views.blocks)}
    if group.family in ("query", "kv_group"):
        view = next(a for a in views.blocks[group.layer].attentions if a.path == group.view)
        found |= {"heads": view.heads, "kv_heads": view.kv_heads, "head_dim": view.head_dim}
    elif group.family == "neuron":
        found["neurons"] = group.units
        found["hidden"] = int(views.blocks[group.layer].entry.meta["val"].shape[-1])
    elif group.family == "expert":
        found["experts"] = group.units
    else:
        found["hidden"] = group.units
    return found


def cost(account: str, group: UnitGroup, views: Views) -> int:
    """What one unit costs: 1, parameters, FLOPs a token of the products alone, or KV bytes a token."""
    if account == "units":
        return 1
    if account == "parameters":
        return group.parameters
    if account == "kv_bytes":
        return group.kv_width * int(views.program.dtype.itemsize)
    products = {linear.weight: 1.0 for linear in views.labels.linears.values()}
    for bank in views.experts:
        share = (bank.top_k or bank.experts) / bank.experts
        products |= dict.fromkeys((bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight), share)
    total = 0
    for occurrence in group.occurrences:
        if occurrence.weight in products:
            shape = views.program.weights[occurrence.weight].expr.shape
            each = 2 * int(np.prod(shape)) * int((occurrence.unit >= 0).sum()) // len(occurrence.unit)
            total += int(products[occurrence.weight] * each)
    return total // group.units


def _explicit(allocate: Explicit, context: Context, groups: list[UnitGroup]) -> tuple[list[Table | None], Budget]:
    listed = allocate.keep if allocate.keep is not None else allocate.remove
    assert listed is not None
    layers = {group.layer for group in groups}
    unknown = sorted(set(listed) - layers)
    if unknown:
        raise PlanError.of(
            "no_such_layer",
            f"allocate lists layer {unknown[0]}, which this step cannot cut",
            notes=(f"it can cut layers {sorted(layers)}",),
        )
    chosen: list[Table | None] = []
    for group in groups:
        units = listed.get(group.layer)
        if units is None:
            chosen.append(None)
            continue
        view = Candidate(_name(group), np.zeros(group.units), group.rows, group.per_row, 1, Fraction(group.units))
        if allocate.remove is not None:
            check_units(view, units)
            units = tuple(i for i in range(group.units) if i not in units)
        kept_units = explicit(view, units)
        if np.asarray(kept_units).shape[-1] < group.least:
            raise PlanError.of(
                "too_few",
                f"{_name(group)} would keep {list(units)}, but {group.least} are chosen for each token",
                help=("keep more",),
            )
        chosen.append(kept_units)
    kept = sum(g.units if keep is None else int(np.asarray(keep).size) for g, keep in zip(groups, chosen, strict=True))
    return chosen, Budget("units", Fraction(kept), kept, sum(group.units for group in groups))


def _cut(config: WidthPass, context: Context, group: UnitGroup, keep: Table) -> Cut:
    views = context.views
    means = {}
    if config.compensation == "mean_bias":
        if context.statistics is None:
            raise PlanError.of(
                "no_calibration", "mean_bias needs calibration text", help=("add calibration: {data: FILE, ...}",)
            )
        means = compensate.mean_bias(group, context.statistics)
    return Cut(
        view=group.view,
        unit=group.family,
        anchor=Anchor.of(views, group.leaf),
        keep=keep,
        size=group.per_row,
        by=Anchor.of(views, group.by) if group.by is not None else None,
        at={"hidden": "producers", "expert": "choices"}.get(group.family, "consumers"),
        means=means,
        score=config.score.kind,
    )


def _name(group: UnitGroup) -> str:
    return f"{group.view}:{group.family}"
