"""Which KV heads keep everything: a table, learnt gates, or a probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.run import bind_inputs, runnable
from graphopt.ops.bounded import grouped
from graphopt.spec import Percent
from graphopt.views import Attention

Scores = dict[str, list[float]]
_ROWS = 2


def named(fit: Sequence[tuple[int, Attention]], table: Mapping[int, tuple[int, ...]]) -> dict[str, set[int]]:
    """KV heads by layer as KV heads by path; raises PlanError for layers or heads that are not there."""
    layers = {index for index, _ in fit}
    lost = sorted(set(table) - layers)
    if lost:
        raise PlanError.of("no_layer", f"layer {lost[0]} has no attention that can be bounded")
    found = {}
    for index, attention in fit:
        wrong = [head for head in table.get(index, ()) if not 0 <= head < attention.kv_heads]
        if wrong:
            raise PlanError.of("no_head", f"{attention.path} has {attention.kv_heads} KV heads, and no head {wrong[0]}")
        found[attention.path] = set(table.get(index, ()))
    return found


def best(scores: Mapping[str, Scores], shares: Mapping[str, Percent]) -> dict[str, set[int]]:
    """The best share of all heads by each score; of equal ones the earlier layer and head."""
    found: dict[str, set[int]] = {}
    for kind, table in scores.items():
        ranked = sorted((-score, i, h) for i, row in enumerate(table.values()) for h, score in enumerate(row))
        paths = list(table)
        for _, i, head in ranked[: math.ceil(shares[kind].of(len(ranked)))]:
            found.setdefault(paths[i], set()).add(head)
    return found


def rounded(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Scores for the trail."""
    return {kind: {path: [round(x, 4) for x in row] for path, row in table.items()} for kind, table in scores.items()}


def gates(program: Program, attentions: Sequence[Attention]) -> Scores:
    """Learnt gates of each attention; raises PlanError for one without."""
    found = {}
    for attention in attentions:
        node = attention.core.args[10] if len(attention.core.args) > 10 else None
        if not isinstance(node, fx.Node):
            raise PlanError.of(
                "no_gates", f"{attention.path} has no learnt gates", help=("put learn_gates before this step",)
            )
        found[attention.path] = program.weights.evaluate(node.meta["weight"], torch.float32).clamp(0, 1).tolist()
    return found


def probe(program: Program, attentions: Sequence[Attention], tokens: int, repeats: int, seed: int) -> dict[str, Scores]:
    """Induction and echo of each KV head on random tokens, repeated, both in 0..1.

    For a token at place i in the second copy or later, with copies K tokens apart, echo is its attention to the places
    i - jK and induction that to i - jK + 1, summed over j = 1, 2, ... and averaged over places and rows. Raises PlanError
    where the program cannot run on such a text.
    """
    spec = next((s for s in program.entry.inputs if s.role == "tokens"), None)
    longest = next((dim.high for dim in program.dims if spec is not None and dim.name in spec.shape[1:]), 0)
    if spec is None or tokens * repeats > longest:
        raise _too_long(tokens, repeats, f"it takes {longest}")
    module = runnable(program, torch.float32, "cpu")
    wanted = {node.name: node for node in module.graph.nodes}
    sides = [wanted[side.name] for a in attentions for side in a.core.args[:2]]  # type: ignore[union-attr]
    next(iter(reversed(module.graph.nodes))).args = (tuple(sides),)
    eliminate_dead_code(module.graph)
    names = [node.meta["weight"] for node in module.graph.nodes if "weight" in node.meta]
    weights = [program.weights.evaluate(name, torch.float32) for name in names]
    generator = torch.Generator().manual_seed(seed)
    vocabulary = _vocabulary(program)
    # Tokens that differ have no copies but those that the probe makes.
    some = [torch.randperm(vocabulary, generator=generator)[:tokens] for _ in range(_ROWS)]
    once = torch.stack(some).repeat(1, -(-tokens // vocabulary))[:, :tokens]
    with torch.no_grad():
        call = fx.GraphModule(torch.nn.Module(), module.graph)
        try:
            values = call(*weights, *bind_inputs(program, {spec.name: once.repeat(1, repeats)}, "cpu"))
        except IndexError as error:
            # A table of positions may be shorter than what the capture allows.
            raise _too_long(tokens, repeats, "it looks positions up in a table that is shorter") from error
    induction: dict[str, torch.Tensor] = {}
    echo: dict[str, torch.Tensor] = {}
    count = tokens * repeats
    gap = torch.arange(count)[:, None] - torch.arange(count)
    copy = (gap > 0) & (gap % tokens == 0)
    behind = (gap > 0) & (gap % tokens == tokens - 1)
    for attention, q, k in zip(attentions, values[::2], values[1::2], strict=True):
        logits = grouped(q, k) * float(attention.core.args[5])  # type: ignore[arg-type]
        rows = torch.softmax(logits.masked_fill(gap < 0, -torch.inf), -1)[..., tokens:, :]
        for table, mask in ((echo, copy), (induction, behind)):
            # A KV head is as good as the best of its query heads.
            score = (rows * mask[tokens:]).sum(-1).mean((0, 3)).amax(-1)
            table[attention.path] = score.tolist()
    return {"induction": induction, "echo": echo}


def _too_long(tokens: int, repeats: int, why: str) -> PlanError:
    return PlanError.of(
        "probe_too_long",
        f"{repeats} times {tokens} random tokens do not fit the program: {why}",
        help=("probe with fewer tokens or repeats",),
    )


def _vocabulary(program: Program) -> int:
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and "input" in node.args[1].meta:
            return int(node.args[0].meta["val"].shape[0])
    raise PlanError.of("no_embedding", "no embedding looks the tokens up, so none can be drawn for the probe")
