"""The edit that adds an early exit with an adapter, and what it reads in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Affine, Const, Expr
from graphopt.passes.speculative.heads import Place, repeat_tail
from graphopt.passkit.edits import Edit
from graphopt.views import Views

aten, ops = torch.ops.aten, torch.ops.graphopt


@dataclass(frozen=True)
class Reads:
    """Names of nodes that the adapter reads: the block's exit, an attention before it, and its rotary turn if any."""

    block: str
    stream: str
    core: str
    turn: str | None
    heads: int
    head_dim: int


def find_reads(views: Views, layer: int) -> Reads | str:
    """What an adapter behind block `layer` reads; the reason when the graph does not have it."""
    block = views.blocks[layer]
    before = [a for b in views.blocks[: layer + 1] for a in b.attentions if a.causal and not a.cross]
    if not before:
        return f"no causal attention stands in the first {layer + 1} blocks, whose heads and positions it would take"
    if block.exit.meta["val"].dim() != 3:
        return f"the stream behind {block.path} is {list(block.exit.meta['val'].shape)}, not [B, S, D]"
    attention = before[-1]
    if attention.value_dim != attention.head_dim or attention.head_dim % 2:
        return "the heads before it have values of another size than their keys, or an odd one"
    turn = attention.core.args[0]
    while isinstance(turn, fx.Node) and turn.target is not ops.rotary.default:
        turn = turn.args[0] if turn.op == "call_function" and turn.args and turn not in views.labels.linears else None
    name = turn.name if isinstance(turn, fx.Node) else None
    return Reads(block.path, block.exit.name, attention.core.name, name, attention.heads, attention.head_dim)


@dataclass(frozen=True, eq=False)
class Exit(Edit):
    """logits = output head(norm(x + attention(norm(x)))) from the stream x behind a block."""

    layer: int
    reads: Reads
    place: Place
    seed: int

    @property
    def candidate(self) -> str:
        """The exit is one candidate."""
        return "model:exit"

    def describe(self) -> str:
        """Where it leaves."""
        return f"add an exit behind {self.reads.block}: an attention of {self.reads.heads} heads, then the output head"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "exit", "block": self.reads.block, "layer": self.layer, "heads": self.reads.heads}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Add the adapter and a result."""
        reads, anchor = self.reads, next(iter(reversed(rewriter.graph.nodes)))
        stream, core = rewriter.node(reads.stream), rewriter.node(reads.core)
        normed = self._norm(rewriter, "exit.attention_norm.weight", stream, anchor)
        width, wide = self.place.width, reads.heads * reads.head_dim
        q, k, v = (
            self._heads(rewriter, self._linear(rewriter, f"exit.{side}.weight", normed, wide, width, anchor), anchor)
            for side in ("q", "k", "v")
        )
        if reads.turn is not None:
            cos, sin, interleaved = rewriter.node(reads.turn).args[1:4]
            q, k = (rewriter.call(ops.rotary.default, x, cos, sin, interleaved, before=anchor) for x in (q, k))
        mask, scale = core.args[3], reads.head_dim**-0.5
        mixed = rewriter.call(
            ops.attention.default, q, k, v, mask, None, scale, core.args[6], None, None, before=anchor
        )
        turned = rewriter.call(aten.transpose.int, mixed, 1, 2, before=anchor)
        flat = rewriter.call(
            aten.reshape.default, turned, [*self._sizes(rewriter, normed, anchor), wide], before=anchor
        )
        out = self._linear(rewriter, "exit.o.weight", flat, width, wide, anchor)
        summed = rewriter.call(aten.add.Tensor, stream, out, before=anchor)
        state = self._norm(rewriter, "exit.norm.weight", summed, anchor)
        rewriter.add_output("exit", repeat_tail(rewriter, self.place, {}, state, anchor))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """What an untrained exit must give: the output head on the normed stream, for its attention adds nothing yet."""
        anchor = next(iter(reversed(rewriter.graph.nodes)))
        state = self._norm(rewriter, "exit.norm.weight", rewriter.node(self.reads.stream), anchor)
        rewriter.add_output("exit", repeat_tail(rewriter, self.place, {}, state, anchor))

    def _norm(self, rewriter: Rewriter, name: str, x: fx.Node, anchor: fx.Node) -> fx.Node:
        """An RMS norm whose gain begins as that of the norm before the output head, or as ones."""
        hidden, kind = rewriter.node(self.place.hidden), rewriter.program.dtype
        expr: Expr = Const(torch.ones(self.place.width, dtype=kind), kind)
        eps, in_float = 1e-6, False
        if hidden.target is ops.rms_norm.default and isinstance(hidden.args[1], fx.Node):
            source = hidden.args[1]
            if "weight" in source.meta:
                expr = Affine(rewriter.weights[source.meta["weight"]].expr, 1.0)
                eps, in_float = hidden.args[2:4]
        gain = rewriter.add_weight(name, expr)
        return rewriter.call(ops.rms_norm.default, x, gain, eps, in_float, before=anchor)

    def _linear(self, rewriter: Rewriter, name: str, x: fx.Node, rows: int, columns: int, anchor: fx.Node) -> fx.Node:
        """x W^T; W is zero behind the attention, so that the exit begins without it, and random before it."""
        kind = rewriter.program.dtype
        value = torch.zeros(rows, columns)
        if not name.startswith("exit.o"):
            generator = torch.Generator().manual_seed(self.seed + sum(map(ord, name)))
            value = torch.randn(rows, columns, generator=generator) / columns**0.5
        weight = rewriter.add_weight(name, Const(value.to(kind), kind))
        return rewriter.call(aten.linear.default, x, weight, before=anchor)

    def _heads(self, rewriter: Rewriter, x: fx.Node, anchor: fx.Node) -> fx.Node:
        """`[B, S, H D]` to `[B, H, S, D]`."""
        sizes = [*self._sizes(rewriter, x, anchor), self.reads.heads, self.reads.head_dim]
        split = rewriter.call(aten.view.default, x, sizes, before=anchor)
        return rewriter.call(aten.transpose.int, split, 1, 2, before=anchor)

    def _sizes(self, rewriter: Rewriter, x: fx.Node, anchor: fx.Node) -> list[fx.Node]:
        return [rewriter.call(aten.sym_size.int, x, axis, before=anchor) for axis in (0, 1)]
