"""The edit that bounds what KV heads see, and queries turned to places inside the cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.follow import Lost
from graphopt.ir.leaving import leaving
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const
from graphopt.passes.cache.sequence import Sequence, packet
from graphopt.passes.cache.slots import tokens_of
from graphopt.passkit.edits import Edit
from graphopt.views import Attention, Views

aten = torch.ops.aten
ops = torch.ops.graphopt


@dataclass(frozen=True, eq=False)
class Bound(Edit):
    """Bound KV heads `heads` of the attention whose core is `node`, by the policy that the other fields say."""

    view: str
    node: str
    heads: tuple[int, ...]
    kv_heads: int
    sink: int
    recent: int
    heavy: int
    compensate: bool
    renumber: bool

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.view

    def describe(self) -> str:
        """How many heads keep what."""
        parts = [f"{self.sink} first", f"{self.recent} last"]
        parts += [f"{self.heavy} heaviest"] if self.heavy else []
        parts += ["1 for the rest"] if self.compensate else []
        places = ", renumbered" if self.renumber else ""
        return f"{self.view}: {len(self.heads)} of {self.kv_heads} KV heads keep {' + '.join(parts)}{places}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "bound", **asdict(self), "heads": list(self.heads)}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The same attention with the policy as arguments."""
        core = rewriter.node(self.node)
        if not self.heads:
            rewriter.replace(core, rewriter.call(ops.attention.default, *core.args[:9], before=core))
            return
        turned = turn(rewriter, views.program, core, self.sink + self.recent) if self.renumber else None
        policy = (list(self.heads), self.sink, self.recent, self.heavy, self.compensate)
        made = rewriter.call(ops.bounded_attention.default, *core.args[:9], turned, None, *policy, before=core)
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """A mask on plain attention where the policy is one; else the op's own meaning, which is a mask by scores."""
        if self.heavy or self.compensate or self.renumber:
            self.apply(rewriter, views)
            return
        core = rewriter.node(self.node)
        q, k, v, padding, sinks, scale, _, _, softcap = core.args[:9]

        def call(target: Any, *args: Any) -> fx.Node:
            return rewriter.call(target, *args, before=core)

        count = call(aten.sym_size.int, k, 2)
        near = call(ops.attention_mask.default, q, padding, count, count, True, self.recent)
        whole = call(ops.attention_mask.default, q, padding, count, count, True, None)
        if padding is None:
            places = call(aten.arange.default, count)
            places.kwargs = {"dtype": torch.int64, "device": torch.device("cpu")}
        else:
            real = call(aten.to.dtype, padding, torch.int64)
            counted = call(aten.sub.Tensor, call(aten.cumsum.default, real, 1), 1)
            places = call(aten.unsqueeze.default, call(aten.unsqueeze.default, counted, 1), 1)
        first = call(aten.logical_and.default, whole, call(aten.lt.Scalar, places, self.sink))
        bounded = call(aten.logical_or.default, near, first)
        heads = int(core.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
        group = heads // self.kv_heads
        free = torch.tensor([h // group not in self.heads for h in range(heads)]).reshape(1, heads, 1, 1)
        weight = rewriter.add_weight(f"free.{core.name}", Const(free, torch.bool), "constant")
        mask = call(aten.logical_or.default, bounded, call(aten.logical_and.default, whole, weight))
        made = call(ops.attention.default, q, k, v, mask, sinks, scale, False, None, softcap)
        rewriter.replace(core, made)


@dataclass(frozen=True, eq=False)
class Gate(Edit):
    """Mix whole and bounded attention of each KV head by gates, which begin at 1: whole."""

    view: str
    node: str
    kv_heads: int
    sink: int
    recent: int

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.view

    @property
    def weight(self) -> str:
        """The name of its gates."""
        return f"{self.view}.gates"

    def describe(self) -> str:
        """How many gates, between what."""
        return f"{self.view}: {self.kv_heads} gates between everything and {self.sink} first + {self.recent} last"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "gate", **asdict(self)}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The attention with its gates."""
        core = rewriter.node(self.node)
        gates = rewriter.add_weight(self.weight, Const(torch.ones(self.kv_heads), torch.float32))
        policy = (list(range(self.kv_heads)), self.sink, self.recent, 0, False)
        made = rewriter.call(ops.bounded_attention.default, *core.args[:9], None, gates, *policy, before=core)
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: gates of 1 change nothing."""


def fits(program: Program, attention: Attention, done: str = "bounded") -> str | None:
    """Why the cache of an attention cannot be `done` (bounded, quantised); None when it can."""
    core = attention.core
    mask = core.args[3]
    if loses_past(program, core):
        return "what leaves in a later layer leaves its cache, so that its policy would not see what it holds"
    if core.target is ops.bounded_attention.default and core.args[10] is None:
        return "it is bounded already"
    if core.target is ops.quantised_attention.default:
        return "its cache is quantised already"
    if done != "bounded" and core.target is ops.bounded_attention.default:
        return "its heads are bounded, or have gates"
    if core.target is ops.admitted_attention.default:
        return "its cache takes admitted tokens alone"
    if core.target not in (ops.attention.default, ops.bounded_attention.default):
        return "it has a cache already"
    if attention.cross:
        return "its keys come from another text and do not grow"
    if not attention.causal:
        return "it is not causal, so its cache cannot be told from its mask"
    if attention.window is not None:
        return f"its window of {attention.window} tokens bounds it already"
    if isinstance(mask, fx.Node) and mask.meta["val"].dim() != 2:
        return "its mask is computed by the graph, and would lose the columns of what is gone"
    return None


def marked(core: fx.Node) -> str | None:
    """Why no mean can stand for keys of an attention that are gone: a feature of its own hides some of them."""
    query = core.args[0]
    if isinstance(query, fx.Node) and query.target is aten.constant_pad_nd.default and any(query.args[2:]):
        return "its keys have a feature by which they hide, and the mean of some that hide would hide all that is gone"
    return None


def loses_past(program: Program, core: fx.Node) -> bool:
    """Whether the cache of an attention loses what leaves in a later layer."""
    try:
        found = leaving(program)
    except Lost:
        return False
    level = None if found is None else found.level(core.args[1].meta["val"].shape[2])  # type: ignore[union-attr]
    return found is not None and level is not None and level < found.past


def turnable(program: Program, core: fx.Node) -> str | None:
    """Why the queries of an attention cannot be turned to other places; None when they can."""
    query = core.args[0]
    if not isinstance(query, fx.Node) or query.target is not ops.rotary.default:
        return "positions cannot be renumbered: its queries are not rotated right before the attention"
    tokens = tokens_of(program)
    if tokens is None:
        return "positions cannot be renumbered: the program does not take one batch of tokens"
    sequence = Sequence(program, tokens)
    for table in query.args[1:3]:
        found, reason = _counters(sequence, table)  # type: ignore[arg-type]
        if reason is not None:
            return f"positions cannot be renumbered: {reason}"
        if not found:
            return f"positions cannot be renumbered: %{table.name} depends on no place"  # type: ignore[union-attr]
    return None


def _counters(sequence: Sequence, table: fx.Node) -> tuple[set[fx.Node], str | None]:
    """Nodes that count places, from which a table of angles is computed."""
    found: set[fx.Node] = set()
    seen, stack = {table}, [table]
    while stack:
        node = stack.pop()
        kind = packet(node)
        if sequence.role(node) == "positions" or (kind is aten.arange and sequence.axes(node)):
            if kind is aten.arange and not (node.args[0] == 0 or _from_zero(node)):
                return found, f"%{node.name} does not count from 0"
            found.add(node)
            continue
        if kind is aten.cumsum:
            return found, f"%{node.name} counts places in a way that is not known"
        if node in sequence.live:
            return found, f"%{node.name} depends on the text"
        for source in node.all_input_nodes:
            if source not in seen and source.op in ("call_function", "placeholder"):
                seen.add(source)
                stack.append(source)
    return found, None


def _from_zero(node: fx.Node) -> bool:
    """Whether an arange has no start of its own."""
    return node.target is aten.arange.default


def turn(rewriter: Rewriter, program: Program, core: fx.Node, limit: int) -> fx.Node:
    """Queries of an attention of today, rotated as if none stood behind place `limit` - 1."""
    tokens = tokens_of(program)
    assert tokens is not None
    query = core.args[0]
    made = rewriter.shared.setdefault(f"places below {limit}", {})
    sequence = rewriter.shared.setdefault("bound_cache", Sequence(program, tokens))
    originals = {rewriter.node(node): node for node in program.graph.graph.nodes}

    def copy(today: Any) -> Any:
        if not isinstance(today, fx.Node) or today not in originals:
            return today
        if today not in made:
            node = originals[today]
            found, _ = _counters(sequence, node)
            if node in found:
                after = (
                    [n for n in rewriter.graph.nodes if n.op == "placeholder"][-1]
                    if node.op == "placeholder"
                    else today
                )
                made[today] = rewriter.call(aten.clamp.default, today, None, limit - 1, after=after)
            elif not found:
                made[today] = today
            else:
                args = fx.node.map_aggregate(today.args, copy)
                made[today] = rewriter.call(today.target, *args, after=today)  # type: ignore[misc]
                made[today].kwargs = fx.node.map_aggregate(today.kwargs, copy)
        return made[today]

    x, cos, sin, interleaved = query.args  # type: ignore[union-attr]
    return rewriter.call(ops.rotary.default, x, copy(cos), copy(sin), interleaved, after=query)
