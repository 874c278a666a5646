"""The edit that gives a bounded attention its buffers: small ones for bounded KV heads, growing ones for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Input
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const
from graphopt.ops.bounded import capacity
from graphopt.passes.cache.slots import Slot, Stage
from graphopt.views import Views

aten = torch.ops.aten
ops = torch.ops.graphopt


@dataclass(frozen=True, eq=False)
class HeldSlot(Slot):
    """A slot of which KV heads `heads` of `kv_heads` hold `entries`; `keys` and `values` are those of the other heads."""

    heads: tuple[int, ...] = ()
    kv_heads: int = 0
    entries: int = 0

    @property
    def grows(self) -> bool:
        """Whether some KV heads keep everything."""
        return len(self.heads) < self.kv_heads

    def describe(self) -> str:
        """What is held."""
        (_, size), (_, value_size) = self.keys, self.values
        free = self.kv_heads - len(self.heads)
        rest = f", {free} that grow" if free else ""
        return (
            f"{self.view}: cache {self.index}, {len(self.heads)} KV heads with {self.entries} entries of "
            f"{size} + {value_size}{rest}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {**super().to_json(), "edit": "held_slot", "heads": list(self.heads), "entries": self.entries}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Bounded heads read what they hold and return what is new; the others write and read growing buffers."""
        stage = Stage.of(rewriter, views.program)
        buffers = stage.buffers(self)
        core = rewriter.node(self.node)
        q, k, v, _, sinks, scale, _, _, softcap = core.args[:9]
        turned, (_, sink, recent, heavy, compensate) = _turned(core), _policy(core, self.kv_heads)
        group = q.meta["val"].shape[1] // self.kv_heads  # type: ignore[union-attr]
        free = tuple(h for h in range(self.kv_heads) if h not in self.heads)

        def of(node: Any, axis: int, heads: tuple[int, ...], by: int) -> Any:
            if node is None or len(heads) == self.kv_heads:
                return node
            rows = tuple(h * by + i for h in heads for i in range(by))
            return rewriter.call(aten.index_select.default, node, axis, _index(rewriter, rows), before=core)

        def sides(heads: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
            return of(q, 1, heads, group), of(k, 1, heads, 1), of(v, 1, heads, 1), of(sinks, 0, heads, group)

        mine, my_keys, my_values, my_sinks = sides(self.heads)
        held = self._inputs(rewriter, stage, heavy > 0, compensate)
        weights = None
        if heavy:
            weights = rewriter.call(
                ops.heavy_weights.default,
                mine, my_keys, held["keys"], held["places"], held["mass"], stage.lengths, stage.spans, my_sinks,
                scale, softcap, sink, recent, heavy,
                before=core,
            )  # fmt: skip
        made = rewriter.call(
            ops.held_attention.default,
            mine, my_keys, my_values, held["keys"], held["values"], stage.lengths, stage.positions, stage.spans,
            weights, my_sinks, scale, softcap, of(turned, 1, self.heads, group), sink, recent, compensate,
            before=core,
        )  # fmt: skip
        for name, node in (("keys", my_keys), ("values", my_values), ("weights", weights)):
            if node is not None:
                rewriter.add_output(f"cache_{self.index}_new_{name}", node)
        if free:
            theirs, keys, values, other = sides(free)
            whole = rewriter.call(
                ops.cached_attention.default,
                theirs, keys, values, *buffers, stage.lengths, stage.positions, stage.spans, None, other, scale,
                None, softcap,
                before=core,
            )  # fmt: skip
            both = rewriter.call(aten.cat.default, [made, whole], 1, before=core)
            order = [h * group + i for h in (*self.heads, *free) for i in range(group)]
            back = tuple(order.index(i) for i in range(len(order)))
            made = rewriter.call(aten.index_select.default, both, 1, _index(rewriter, back), before=core)
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """As `apply`: that buffers hold what the mask shows is proven by decoding, not at random inputs."""
        self.apply(rewriter, views)

    def _inputs(self, rewriter: Rewriter, stage: Stage, heavy: bool, compensate: bool) -> dict[str, fx.Node]:
        """Inputs for what bounded heads hold, and for heavy hitters which tokens those are and what they received."""
        heads, slots = len(self.heads), self.entries + compensate
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "keys": ((heads, slots, self.keys[1]), self.dtype),
            "values": ((heads, slots, self.values[1]), self.dtype),
        }
        if heavy:
            shapes |= {"places": ((heads, slots), torch.int64), "mass": ((heads, slots), self.dtype)}
        return {
            name: rewriter.add_input(Input(f"cache_{self.index}_held_{name}", (stage.batch, *shape), dtype, "cache"))
            for name, (shape, dtype) in shapes.items()
        }


def held_slot(slot: Slot, core: fx.Node) -> HeldSlot:
    """A slot of a bounded attention, or of one with a window, from what it would be if nothing were bounded."""
    (kv_heads, size), (_, value_size) = slot.keys, slot.values
    bounded, sink, recent, heavy, _ = _policy(core, kv_heads)
    free = kv_heads - len(bounded)
    return HeldSlot(
        slot.view, slot.node, slot.index, (free, size), (free, value_size), slot.dtype, slot.level, bounded, kv_heads,
        capacity(sink, recent, heavy),
    )  # fmt: skip


def _policy(core: fx.Node, kv_heads: int) -> tuple[tuple[int, ...], int, int, int, bool]:
    """Bounded KV heads, `sink`, `recent`, `heavy` and `compensate`; a window is the last tokens of all heads."""
    if core.target is ops.bounded_attention.default:
        heads, sink, recent, heavy, compensate = core.args[11:16]
        return tuple(heads), sink, recent, heavy, compensate  # type: ignore[arg-type,return-value]
    return tuple(range(kv_heads)), 0, core.args[7], 0, False  # type: ignore[return-value]


def _turned(core: fx.Node) -> Any:
    """Queries at their places inside the cache, where a bounded attention has them."""
    return core.args[9] if core.target is ops.bounded_attention.default else None


def _index(rewriter: Rewriter, rows: tuple[int, ...]) -> fx.Node:
    """Numbers of heads as a constant, one for all attentions that use the same."""
    known: dict[tuple[int, ...], fx.Node] = rewriter.shared.setdefault("held heads", {})
    if rows not in known:
        value = Const(torch.tensor(rows), torch.int64)
        known[rows] = rewriter.add_weight(f"cache.heads.{len(known)}", value, "constant")
    return known[rows]
