"""Compensation: what the consumers of cut units should read instead of nothing."""

from __future__ import annotations

import torch

from graphopt.observe import Statistics, Tap
from graphopt.views import UnitGroup


def mean_taps(group: UnitGroup) -> tuple[Tap, ...]:
    """The statistics that `mean_bias` needs."""
    return tuple(dict.fromkeys(Tap(consumer.x, "moments") for consumer in group.consumers))


def mean_bias(group: UnitGroup, statistics: Statistics) -> dict[str, torch.Tensor]:
    """Mean input `[in features]`, float64, of each product that reads the units, by the product's node.

    Adding W[:, cut] mean(x_cut) to its bias is the least-squares constant for what the product loses, so its output
    error on the calibration text never exceeds that of plain removal (FLAP, arXiv 2312.11983).
    """
    return {consumer.linear.node.name: statistics.moments(consumer.x).mean for consumer in group.consumers}
