"""Planning of routes: which choices of which bank; and the edit that changes what a bank reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.rewriter import Rewriter
from graphopt.observe import Tap
from graphopt.passes.experts.narrow import Choices, readers, resize
from graphopt.passes.experts.reroute import Reroute
from graphopt.passkit import Context
from graphopt.passkit.edits import Decline, Edit, Plan
from graphopt.views import Experts, Views

# Values closer than this share of the largest may be the same one, summed in another order in float32.
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Route(Edit):
    """Let a bank read other choices than its router made."""

    bank: str
    choices: Choices

    @property
    def candidate(self) -> str:
        """The bank."""
        return self.bank

    def describe(self) -> str:
        """Which choices are left."""
        if self.choices.rank is not None:
            return f"{self.bank}: choice {self.choices.rank} alone"
        if self.choices.top_k is not None:
            return f"{self.bank}: the best {self.choices.top_k} choices"
        but = "" if self.choices.protected is None else f", but for tokens of size {self.choices.protected:.4g} or more"
        return f"{self.bank}: choices below {self.choices.below:.4g} of the best are dropped{but}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        held = {name: value for name, value in asdict(self.choices).items() if value is not None}
        return {"edit": "route", "bank": self.bank, **held}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Compute the rows that are left, and no others."""
        bank = bank_of(views, self.bank)
        self._insert(rewriter, bank, narrow=True)
        if self.choices.count is not None:
            resize(views, bank, self.choices.count, rewriter.node)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Compute all rows, those that are left out counting nothing."""
        self._insert(rewriter, bank_of(views, self.bank), narrow=False)

    def _insert(self, rewriter: Rewriter, bank: Experts, narrow: bool) -> None:
        assert bank.index is not None
        assert bank.share is not None
        index, share = rewriter.node(bank.index), rewriter.node(bank.share)
        reading = {rewriter.node(user) for user in readers(bank)}
        order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
        late = share if order[share] > order[index] else index
        if any(order[user] < order[late] for user in reading):
            raise PlanError.of("early_reader", f"the choices of {bank.path} are read before what they count is known")
        made = self.choices.insert(rewriter, index, share, late.next, narrow, rewriter.node(bank.source))
        for user in reading:
            user.replace_input_with(index, made[0])
            user.replace_input_with(share, made[1])


def bank_of(views: Views, path: str) -> Experts:
    """The bank of a path."""
    return next(bank for bank in views.experts if bank.path == path)


def candidates(context: Context, choices: Choices) -> tuple[list[Experts], list[Decline]]:
    """Banks that a step covers and that can be routed so, and why the others cannot."""
    views = context.views
    found: list[Experts] = []
    declines: list[Decline] = []
    for bank in views.experts:
        block = next((block for block in views.blocks if bank in block.experts), None)
        if block is None:
            reason: str | None = "it lies outside the layers"
        elif not (context.covers(block.index, bank.path) or context.covers(block.index, block.path)):
            reason = "outside `where`"
        else:
            reason = choices.reason(bank)
        if reason is None:
            found.append(bank)
        else:
            declines.append(Decline(views.candidate(bank), reason))
    for one in views.unseen:
        if one.what.startswith("experts "):
            declines.append(Decline(one.what.partition(" ")[2], one.reason))
    if not found and not declines:
        declines.append(Decline("model", "no bank of experts was found"))
    return found, declines


def taps(config: Reroute, context: Context) -> tuple[Tap, ...]:
    """What choices count, row by row, for banks whose median is asked for."""
    if not config.needs_calibration():
        return ()
    banks, _ = candidates(context, _asked(config))
    shares = [Tap(bank.share.name, "rows") for bank in banks if bank.share is not None]
    sizes = [Tap(bank.source.name, "rows") for bank in banks if config.protect is not None]
    return (*shares, *sizes)


def _asked(config: Reroute) -> Choices:
    """The choices as the options say them, a median as if it were 1."""
    below = 1.0 if config.below == "median" else config.below
    return Choices(config.rank, config.top_k, below)


def plan(config: Reroute, context: Context) -> Plan:
    """A route or a decline for every bank."""
    choices = _asked(config)
    banks, declines = candidates(context, choices)
    if not config.needs_calibration():
        return Plan(tuple(Route(bank.path, choices) for bank in banks), tuple(declines))
    if banks and context.statistics is None:
        raise PlanError.of("no_calibration", "a median or a share of protected tokens needs calibration text")
    edits: list[Edit] = []
    notes: dict[str, Any] = {}
    for bank in banks:
        made, dropped = _calibrated(config, context, bank)
        edits.append(Route(bank.path, made))
        notes[bank.path] = {"below": made.below, "protected": made.protected, "dropped": dropped}
    return Plan(tuple(edits), tuple(declines), {"dropped": notes} if notes else {})


def _calibrated(config: Reroute, context: Context, bank: Experts) -> tuple[Choices, float]:
    """Thresholds as calibration text shows them, and the share of all choices but the best ones that they drop there."""
    assert context.statistics is not None
    assert bank.share is not None
    share = context.statistics.rows(bank.share.name).rows.double().flatten(0, -2)
    ratio = share.sort(dim=-1, descending=True).values
    ratio = ratio[:, 1:] / ratio[:, :1]
    below = _between(ratio[:, 0], 0.5) if config.below == "median" else config.below
    assert isinstance(below, float)
    gone = ratio < below
    if config.protect is None:
        return Choices(below=below), float(gone.double().mean())
    size = context.statistics.rows(bank.source.name).rows.double().abs().sum(-1).flatten()
    protected = _between(size, 1 - float(config.protect.fraction))
    gone &= (size < protected)[:, None]
    return Choices(below=below, protected=protected), float(gone.double().mean())


def _between(values: torch.Tensor, share: float) -> float:
    """A bound with about `share` of the values `[n]` below it and none near it, so that rounding decides about no token.

    It lies halfway in the gap next to the quantile; where all values are one, below them.
    """
    ordered = values.sort().values
    ends = torch.cat([ordered.new_zeros(1), ordered, 2 * ordered[-1:]])
    gaps = ends.diff()
    places = torch.arange(len(gaps), dtype=torch.float64)
    far = (places - share * len(ordered)).abs().masked_fill(gaps <= ROUNDING * ends[-1], torch.inf)
    place = int(far.argmin())
    return float((ends[place] + ends[place + 1]) / 2)
