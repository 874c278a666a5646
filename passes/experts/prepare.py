"""What a plan works out for each feed-forward: its groups, its shared neurons and its router."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.observe import Activity, Grouped, Statistics
from graphopt.passes.experts import partition, routers
from graphopt.passes.experts.dense import Dense, Unfit
from graphopt.passes.experts.options import Fitted, KMeans, Masks, Partition, Random, Router, Static, Tokens, Trained
from graphopt.passkit import Context
from graphopt.spec import Percent

Groups = tuple[tuple[int, ...], ...]


def tokens_of(program: Program) -> str | None:
    """The node of the tokens that a program reads; None when it reads none."""
    names = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    return next((n.name for n in program.graph.graph.nodes if n.meta.get("input") in names), None)


@dataclass(frozen=True, eq=False)
class Prepared:
    """The neurons of each expert, those that all tokens go through, and the norms `[I]` of their output columns."""

    groups: Groups
    shared: tuple[int, ...]
    norms: torch.Tensor

    @staticmethod
    def of(context: Context, dense: Dense, experts: int, how: Partition, share: Percent | None) -> Prepared:
        """Groups as the options say; raises Unfit when there are too few neurons."""
        neurons = dense.view.neurons
        norms = _norms(context.program, dense)
        if isinstance(how, Masks):
            kept = ceil(how.keep.of(neurons))
            by_domain = _grouped(context.statistics, dense, None)
            shared, groups = partition.masked(partition.domains(by_domain, experts), kept)
            if max(map(len, groups)) < 2:
                raise Unfit(f"{experts} domains keep {len(shared)} of the same {kept} of {neurons} neurons")
            return Prepared(groups, shared, norms)
        shared = ()
        if share is not None:
            weight = activity(context.statistics, dense).mean * norms
            order = torch.argsort(weight, descending=True, stable=True)
            shared = tuple(sorted(order[: int(share.of(neurons))].tolist()))
        rest = [neuron for neuron in range(neurons) if neuron not in set(shared)]
        if len(rest) < 2 * experts:
            raise Unfit(f"it has {len(rest)} neurons to share out, fewer than two for each of {experts} experts")
        if isinstance(how, KMeans):
            similar = partition.alike(activity(context.statistics, dense), how.alike == "correlation")
            return Prepared(partition.clustered(similar, rest, experts, how.seed), shared, norms)
        return Prepared(partition.in_order(rest, experts), shared, norms)


def router_of(
    context: Context, how: Router, fit: list[tuple[Dense, Prepared]], count: int
) -> list[dict[str, torch.Tensor]]:
    """The weights of the routers by name: one for each feed-forward, or the same table for all.

    `count` is how many experts a token goes to.
    """
    if isinstance(how, Tokens) and fit:
        program, tokens = context.program, tokens_of(context.program)
        found = [_grouped(context.statistics, dense, tokens) for dense, _ in fit]
        table = routers.by_token(
            found, [p.norms for _, p in fit], [p.groups for _, p in fit], _vocabulary(program, tokens), how.spread
        )
        return [{"tokens": table} for _ in fit]
    return [_router(context, how, dense, prepared, count) for dense, prepared in fit]


def _router(context: Context, how: Router, dense: Dense, prepared: Prepared, count: int) -> dict[str, torch.Tensor]:
    experts, width = len(prepared.groups), int(dense.x.meta["val"].shape[-1])
    if isinstance(how, Random):
        return {"weight": routers.random(experts, width, how.seed, dense.view.path, how.spread)}
    if isinstance(how, Fitted | Static):
        seen = activity(context.statistics, dense)
        if isinstance(how, Static):
            scores = routers.static(seen, prepared.norms, prepared.groups, how.spread)
            return {"weight": routers.zero(experts, width), "bias": scores}
        return {"weight": routers.fitted(seen, prepared.norms, prepared.groups, how.ridge, how.spread)}
    if isinstance(how, Trained):
        found, down = _needed(context.statistics), dense.view.down
        x, hidden = (found.rows(node.name).rows for node in (dense.x, down.x))
        matrix = _matrix(context.program, dense)
        scores = routers.trained(x, hidden, matrix, prepared.groups, count, how.steps, how.ridge, how.spread)
        return {"weight": scores}
    return {"weight": routers.zero(experts, width)}


def activity(statistics: Statistics | None, dense: Dense) -> Activity:
    """What calibration saw of a feed-forward's neurons; raises PlanError when there was none."""
    return _needed(statistics).activity(dense.view.down.x.name, dense.x.name)


def _grouped(statistics: Statistics | None, dense: Dense, other: str | None) -> Grouped:
    return _needed(statistics).grouped(dense.view.down.x.name, other)


def _needed(statistics: Statistics | None) -> Statistics:
    if statistics is None:
        raise PlanError.of(
            "no_calibration",
            "refactor_moe with these options needs calibration text",
            help=("add calibration: {data: FILE, samples: 64, seq: 256}, or use partition: order and router: zero",),
        )
    return statistics


def _norms(program: Program, dense: Dense) -> torch.Tensor:
    if program.weights.source is None:
        return torch.ones(dense.view.neurons, dtype=torch.float64)
    return _matrix(program, dense).norm(dim=0)


def _matrix(program: Program, dense: Dense) -> torch.Tensor:
    """The down projection `[out, I]`."""
    down = dense.view.down
    weight = program.weights.evaluate(down.weight, torch.float64)
    return weight if down.out_axis == 0 else weight.T


def _vocabulary(program: Program, tokens: str | None) -> int:
    """Rows of the tables that tokens are looked up in."""
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and getattr(node.args[1], "name", None) == tokens:
            return int(node.args[0].meta["val"].shape[0])
    raise Unfit("its tokens are looked up in no table")
