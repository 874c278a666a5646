"""Scores of units, in float64: the higher, the more the unit is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.observe import Layout, Statistics, Tap
from graphopt.select.options import Activation, Fluctuation, Magnitude, Order, RoutingScore, TaylorScore
from graphopt.views import Experts, UnitGroup, Views, coordinates, find

AnyScore = Magnitude | Fluctuation | Activation | TaylorScore | RoutingScore | Order
Normalise = str
# Bytes in float64 of the rows that are looked at together: few enough for a cache.
_PIECE = 4 << 20


@dataclass(frozen=True)
class Features:
    """Scores of features `[d]` and the unit `[d]` that each belongs to, -1 for none."""

    scores: torch.Tensor
    unit: torch.Tensor

    def selected(self) -> Features:
        """The features that belong to a unit."""
        inside = self.unit >= 0
        return Features(self.scores[inside], self.unit[inside])


def taps(group: UnitGroup, views: Views, options: AnyScore) -> tuple[Tap, ...]:
    """The statistics that a score of this group needs."""
    if isinstance(options, Fluctuation):
        return tuple(dict.fromkeys(Tap(consumer.x, "moments", consumer.layout) for consumer in group.consumers))
    if isinstance(options, Activation):
        return tuple(Tap(node, "moments", layout) for node, layout, _ in _watched(group, views))
    if isinstance(options, TaylorScore):
        return tuple(Tap(node, "taylor", layout) for node, layout, _ in _watched(group, views))
    if isinstance(options, RoutingScore):
        return (routing_tap(_bank(group, views)),)
    return ()


def score(
    group: UnitGroup, views: Views, statistics: Statistics | None, options: AnyScore, normalise: Normalise = "none"
) -> torch.Tensor:
    """Scores `[units]` of a group in float64.

    `normalise` makes the features of different groups comparable before they become units: `zscore` (FLAP's AL-AM,
    arXiv 2312.11983), `mean` (divided by the mean), `none`. Raises PlanError when a score is not finite, a statistic is
    missing, or the program holds no weights.
    """
    if isinstance(options, Order):
        found = _order(group)
    elif isinstance(options, Magnitude):
        found = _normalised(_magnitude(group, views.program), normalise)
    elif statistics is None:
        raise PlanError.of(
            "no_calibration",
            f"score {options.kind} needs calibration text",
            help=("add calibration: {data: FILE, ...}",),
        )
    elif isinstance(options, TaylorScore):
        found = _normalised(_taylor(group, views, statistics), normalise)
    elif isinstance(options, RoutingScore):
        found = _normalised(_routing(group, views, statistics, options.metric), normalise)
    elif isinstance(options, Activation):
        found = _units(group, _activation(group, views, statistics), options.reduce, normalise)
    else:
        found = _units(group, _fluctuation(group, views.program, statistics, options.metric), options.reduce, normalise)
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).nonzero()[0])
        raise PlanError.of(
            "not_finite",
            f"the {options.kind} score of {group.family} {bad} of {group.view} is not finite",
            help=("check the weights of this view for NaN and infinities",),
        )
    return found


def _order(group: UnitGroup) -> torch.Tensor:
    return -torch.arange(group.units, dtype=torch.float64)


def _magnitude(group: UnitGroup, program: Program) -> torch.Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for occurrence in group.occurrences:
        if program.weights[occurrence.weight].kind != "parameter":
            continue
        squares = _energy(program, occurrence.weight, occurrence.axis)
        total += _summed(Features(squares, torch.from_numpy(occurrence.unit)), group.units)
    return total.sqrt()


def _energy(program: Program, name: str, axis: int) -> torch.Tensor:
    """Sums of squares of a weight over all axes but one, read by rows, so that a large one is never whole in float64."""
    try:
        parts = []
        for piece in program.weights.pieces(name, _PIECE, torch.float64):
            others = [i for i in range(piece.dim()) if i != axis]
            parts.append(piece.square().sum(others) if others else piece.square())
    except LookupError as error:
        raise _unreadable(name, error) from error
    return torch.cat(parts) if axis == 0 else torch.stack(parts).sum(0)


def _weight(program: Program, name: str) -> torch.Tensor:
    try:
        return program.weights.evaluate(name, torch.float64)
    except LookupError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: LookupError) -> PlanError:
    return PlanError.of(
        "no_weights",
        f"this score reads weights, but {name} cannot be read: {error}",
        help=("use score: order, which needs none",),
    )


def _fluctuation(group: UnitGroup, program: Program, statistics: Statistics, metric: str) -> Iterator[Features]:
    squared = group.family in ("query", "kv_group")
    for consumer in group.consumers:
        moments = statistics.moments(consumer.x, consumer.layout)
        if metric == "ifv":
            scores = moments.variance
        elif metric == "wifv":
            scores = moments.variance * _energy(program, consumer.linear.weight, consumer.linear.in_axis)
        else:
            columns = _weight(program, consumer.linear.weight).movedim(consumer.linear.in_axis, -1).flatten(0, -2)
            scores = columns.abs().mean(0) * (moments.count * moments.square_mean).sqrt()
        yield Features(scores.square() if squared else scores, torch.from_numpy(consumer.unit))


def _activation(group: UnitGroup, views: Views, statistics: Statistics) -> Iterator[Features]:
    for node, layout, unit in _watched(group, views):
        yield Features(statistics.moments(node, layout).sample_l2, unit)


def _taylor(group: UnitGroup, views: Views, statistics: Statistics) -> torch.Tensor:
    """Per sample the terms of a unit are summed over its features and nodes, because they go together."""
    total: torch.Tensor | None = None
    for node, layout, unit in _watched(group, views):
        terms = statistics.taylor(node, layout).terms
        if total is None:
            total = terms.new_zeros(terms.shape[0], group.units)
        inside = unit >= 0
        total.index_add_(1, unit[inside], terms[:, inside])
    if total is None:
        raise _unread(group)
    return total.abs().mean(0)


def _bank(group: UnitGroup, views: Views) -> Experts:
    return next(bank for bank in views.experts if find(bank.expert) is group.leaf)


def routing_tap(bank: Experts) -> Tap:
    """The statistic of a bank's router; raises PlanError when the graph does not show what it chooses."""
    if bank.index is None or bank.share is None:
        raise PlanError.of(
            "no_routing",
            f"the graph does not show which experts of {bank.path} a token goes to, and what each counts",
            help=("use score: magnitude",),
        )
    return Tap(bank.index.name, "routing", "last", bank.share.name)


def _routing(group: UnitGroup, views: Views, statistics: Statistics, metric: str) -> torch.Tensor:
    tap = routing_tap(_bank(group, views))
    found = statistics.routing(tap.node, str(tap.other))
    values = (found.chosen if metric == "frequency" else found.share) / max(found.count, 1)
    return torch.cat([values, values.new_zeros(group.units - len(values))])


def _watched(group: UnitGroup, views: Views) -> Iterator[tuple[str, Layout, torch.Tensor]]:
    """Nodes that hold the units' activations and how these lie, each once: consumers' inputs; for the stream, norms."""
    if group.family == "hidden":
        for node, axis in views.labels.norms.items():
            unit = coordinates(axis, group.leaf)
            if (unit >= 0).any():
                yield node.name, "last", torch.from_numpy(unit)
        return
    for x, consumer in {consumer.x: consumer for consumer in group.consumers}.items():
        yield x, consumer.layout, torch.from_numpy(consumer.unit)


def _units(group: UnitGroup, features: Iterator[Features], reduce: str, normalise: Normalise) -> torch.Tensor:
    """Reduce within each node and sum over nodes."""
    total: torch.Tensor | None = None
    for found in features:
        selected = found.selected()
        scores = _REDUCE[reduce](Features(_normalised(selected.scores, normalise), selected.unit), group.units)
        total = scores if total is None else total + scores
    if total is None:
        raise _unread(group)
    return total


def _unread(group: UnitGroup) -> PlanError:
    return PlanError.of(
        "no_consumer",
        f"no product reads {group.family} of {group.view}, so its activations cannot be scored",
        help=("use score: magnitude",),
    )


def _normalised(scores: torch.Tensor, how: Normalise) -> torch.Tensor:
    if how == "none" or len(scores) < 2:
        return scores if how == "none" else torch.zeros_like(scores)
    if how == "mean":
        mean = scores.abs().mean()
        return scores / mean if mean > 0 else scores
    spread = scores.std()
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def _summed(features: Features, units: int) -> torch.Tensor:
    chosen = features.selected()
    return torch.zeros(units, dtype=torch.float64).index_add_(0, chosen.unit, chosen.scores.to(torch.float64))


def _mean(features: Features, units: int) -> torch.Tensor:
    return _summed(features, units) / torch.bincount(features.unit, minlength=units).clamp_min(1)


def _l2(features: Features, units: int) -> torch.Tensor:
    return _summed(Features(features.scores.square(), features.unit), units).sqrt()


def _max(features: Features, units: int) -> torch.Tensor:
    start = torch.full((units,), -torch.inf, dtype=torch.float64)
    # index_reduce_ would do the same, and warn every user that it is in beta.
    return start.scatter_reduce_(0, features.unit, features.scores, "amax")


_REDUCE: dict[str, Callable[[Features, int], torch.Tensor]] = {"mean": _mean, "sum": _summed, "l2": _l2, "max": _max}
