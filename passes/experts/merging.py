"""Planning of merges: which experts are alike; and the edit that puts their means in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import BlockMap, Const, Expr
from graphopt.observe import Tap
from graphopt.passes.experts.merge_experts import MergeExperts
from graphopt.passkit import Context
from graphopt.passkit.edits import Decline, Edit, Plan
from graphopt.select.expert_rows import ExpertRows, row_taps
from graphopt.select.score import routing_tap
from graphopt.views import Experts, Views, find, leaves

aten = torch.ops.aten
# Rows that experts are compared on: each of them reads all of these.
_ROWS = 256


@dataclass(frozen=True, eq=False)
class Merge(Edit):
    """Put the weighted means of sets of experts in the place of a bank's matrices and biases.

    `sets` holds the members of each set, `shares` what each counts in the mean; `weights` are read by the choice of experts.
    """

    bank: str
    weights: tuple[str, ...]
    sets: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]

    @property
    def candidate(self) -> str:
        """The bank."""
        return self.bank

    @property
    def experts(self) -> int:
        """How many there were."""
        return sum(map(len, self.sets))

    def describe(self) -> str:
        """How many become how many."""
        return f"{self.bank}: {self.experts} experts become {len(self.sets)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "merge",
            "bank": self.bank,
            "sets": [list(members) for members in self.sets],
            "shares": [list(shares) for shares in self.shares],
        }

    def _table(self) -> torch.Tensor:
        table = torch.zeros(self.experts, dtype=torch.int64)
        for number, members in enumerate(self.sets):
            table[list(members)] = number
        return table

    def _means(self, expr: Expr, rows: list[int]) -> Expr:
        """One mean for each entry of `rows`, of the set that it names."""
        longest = max(map(len, self.sets))
        members, maps = [], torch.zeros(len(rows), longest, 1, 1, dtype=torch.float64)
        for i, number in enumerate(rows):
            held, shares = self.sets[number], self.shares[number]
            members.append((*held, *([held[0]] * (longest - len(held)))))
            maps[i, : len(held), 0, 0] = torch.tensor(shares, dtype=torch.float64)
        return BlockMap(expr, 0, tuple(members), maps)

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Keep one matrix for each set, and send each choice to the set of its expert."""
        table = rewriter.add_weight(f"{self.bank}.sets", Const(self._table(), torch.int64), "buffer")
        sent: dict[fx.Node, fx.Node] = {}
        for name in self.weights:
            for user in list(rewriter.weight_node(name).users):
                (index,) = user.args[1]  # type: ignore[misc]
                if index not in sent:
                    sent[index] = rewriter.call(aten.index.Tensor, table, [index], after=index)
                user.args = (user.args[0], [sent[index]])
            rewriter.set_weight(name, lambda expr: self._means(expr, list(range(len(self.sets)))))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Put the mean of its set in the place of each expert."""
        for name in self.weights:
            rewriter.set_weight(name, lambda expr: self._means(expr, self._table().tolist()))


def taps(config: MergeExperts, context: Context) -> tuple[Tap, ...]:
    """Rows and routing of the banks that may be merged."""
    found: dict[Tap, None] = {}
    for bank in context.views.experts:
        if _reason(context, bank) is None:
            if config.weigh != "equal":
                found[routing_tap(bank)] = None
            if config.alike == "outputs":
                found.update(dict.fromkeys(row_taps(bank)))
            elif config.alike == "routing":
                found[Tap(_scores(bank), "gram")] = None
    return tuple(found)


def plan(config: MergeExperts, context: Context) -> Plan:
    """A merge or a decline for every bank."""
    views = context.views
    edits: list[Edit] = []
    declines: list[Decline] = []
    for bank in views.experts:
        reason = _reason(context, bank)
        if reason is not None:
            declines.append(Decline(views.candidate(bank), reason))
            continue
        wanted = config.keep.of(bank.experts, {"experts": bank.experts, "layers": len(views.blocks)})
        count = max(1, round(wanted))
        if count >= bank.experts:
            declines.append(Decline(bank.path, f"keeps all {bank.experts}"))
            continue
        sets = _sets(_likeness(config, context, bank), count)
        edits.append(Merge(bank.path, _read_by_choice(views, bank), sets, _shares(config, context, bank, sets)))
    for one in views.unseen:
        if one.what.startswith("experts "):
            declines.append(Decline(one.what.partition(" ")[2], one.reason))
    if not edits and not declines:
        declines.append(Decline("model", "no bank of experts was found"))
    return Plan(tuple(edits), tuple(declines))


def _reason(context: Context, bank: Experts) -> str | None:
    views = context.views
    block = next((block for block in views.blocks if bank in block.experts), None)
    if block is None:
        return "it lies outside the layers"
    if not (context.covers(block.index, bank.path) or context.covers(block.index, block.path)):
        return "outside `where`"
    if bank.experts < 2:
        return "it has a single expert"
    first = next(other for other in views.experts if other.down.weight == bank.down.weight)
    if first is not bank:
        return f"it shares its weights with {first.path}"
    if bank.down.index is None:
        return "every expert sees every token, so that there is no choice to send elsewhere"
    return None


def _read_by_choice(views: Views, bank: Experts) -> tuple[str, ...]:
    """Weights with one entry for each expert that are read by the number of the expert: matrices and biases."""
    nodes, held = views.program.weight_nodes, []
    for name, axes in views.labels.weight_axes.items():
        users = list(nodes[name].users)
        numbered = axes and find(bank.expert) in set(leaves(axes[0]))
        if numbered and users and all(user.target is aten.index.Tensor and len(user.args[1]) == 1 for user in users):  # type: ignore[arg-type]
            held.append(name)
    missing = {bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight} - set(held)
    if missing:
        raise PlanError.of(
            "bank_read",
            f"{sorted(missing)[0]!r} of {bank.path} is read by more than the choice of experts",
            help=("leave this layer out with `where`",),
        )
    return tuple(held)


def _likeness(config: MergeExperts, context: Context, bank: Experts) -> torch.Tensor:
    """Cosines `[experts, experts]` of weights or outputs, or correlations of scores, in float64."""
    program = context.program
    if config.alike != "weights" and context.statistics is None:
        raise PlanError.of("no_calibration", f"{config.alike} are compared on calibration text")
    if config.alike == "routing":
        assert context.statistics is not None
        found = context.statistics.gram(_scores(bank), "last")
        products = found.gram - found.count * torch.outer(found.mean, found.mean)
    elif config.alike == "outputs":
        assert context.statistics is not None
        made = ExpertRows(program, bank, context.statistics, _ROWS).outputs().to(torch.float64)
        products = made @ made.T
    else:
        products = torch.zeros(bank.experts, bank.experts, dtype=torch.float64)
        for name in dict.fromkeys((bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight)):
            try:
                flat = program.weights.evaluate(name, torch.float32).flatten(1)
            except LookupError as error:
                raise PlanError.of("no_weights", f"experts are compared by weights, but {name}: {error}") from error
            products += (flat @ flat.T).to(torch.float64)
    norms = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return products / norms[:, None] / norms[None, :]


def _scores(bank: Experts) -> str:
    """The node of the router's scores."""
    if bank.router is None:
        raise PlanError.of(
            "no_router",
            f"no product gives the scores of {bank.path}, so that experts cannot be compared by them",
            help=("use alike: weights",),
        )
    return str(bank.router.node.name)


def _sets(alike: torch.Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Join the two sets that are most alike on average until `count` are left; ties join the lowest numbers."""
    sets = [[i] for i in range(len(alike))]
    # Sums of likeness between sets, divided by the number of pairs when compared.
    sums = alike.clone()
    while len(sets) > count:
        sizes = torch.tensor([len(members) for members in sets], dtype=torch.float64)
        mean = sums / sizes[:, None] / sizes[None, :]
        mean[torch.ones_like(mean, dtype=torch.bool).tril()] = -torch.inf
        first, second = divmod(int(mean.argmax()), len(sets))
        sets[first] = sorted(sets[first] + sets.pop(second))
        sums[first] += sums[second]
        sums[:, first] += sums[:, second]
        stay = [i for i in range(len(sums)) if i != second]
        sums = sums[stay][:, stay]
    return tuple(tuple(members) for members in sets)


def _shares(
    config: MergeExperts, context: Context, bank: Experts, sets: tuple[tuple[int, ...], ...]
) -> tuple[tuple[float, ...], ...]:
    used = torch.ones(bank.experts, dtype=torch.float64)
    if config.weigh != "equal":
        if context.statistics is None:
            raise PlanError.of("no_calibration", f"weigh: {config.weigh} needs calibration text")
        tap = routing_tap(bank)
        found = context.statistics.routing(tap.node, str(tap.other))
        values = found.chosen if config.weigh == "frequency" else found.share
        used = torch.cat([values, values.new_zeros(bank.experts - len(values))])
    shares = []
    for members in sets:
        each = used[list(members)]
        # A set that the text never used is averaged as if all its members were.
        each = each / each.sum() if float(each.sum()) > 0 else torch.full_like(each, 1 / len(each))
        shares.append(tuple(each.tolist()))
    return tuple(shares)
