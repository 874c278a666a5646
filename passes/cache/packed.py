"""The edits of quantised caches: older keys and values rounded by blocks, and the packed buffers of what is rounded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Dim, Input
from graphopt.ir.rewriter import Rewriter
from graphopt.ops.quantised import groups, row_bytes
from graphopt.passes.cache.slots import CAPACITY, Slot, Stage
from graphopt.passkit.edits import Edit
from graphopt.views import Views

ops = torch.ops.graphopt


def is_quantised(core: fx.Node) -> bool:
    """Whether an attention reads older keys and values in few bits."""
    return core.target is ops.quantised_attention.default


@dataclass(frozen=True, eq=False)
class Coarse(Edit):
    """Let the attention whose core is `node` read all but the last `recent` tokens in `bits` bits, by blocks of `group`."""

    view: str
    node: str
    bits: int
    group: int
    recent: int

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.view

    def describe(self) -> str:
        """What is rounded."""
        return f"{self.view}: {self.bits} bits in blocks of {self.group} tokens, the last {self.recent} whole"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "coarse", **asdict(self)}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The same attention with the grid as arguments."""
        core = rewriter.node(self.node)
        made = rewriter.call(
            ops.quantised_attention.default, *core.args[:9], self.bits, self.group, self.recent, before=core
        )
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """As `apply`: the op is its meaning, and what packed buffers give is proven by decoding."""
        self.apply(rewriter, views)


@dataclass(frozen=True, eq=False)
class PackedSlot(Slot):
    """A slot of blocks of `group` tokens in `bits` bits, and of a ring that holds `recent` + `group` tokens."""

    bits: int = 8
    group: int = 8
    recent: int = 8

    @staticmethod
    def of(slot: Slot, core: fx.Node) -> PackedSlot:
        """The slot of a quantised attention, from what it would be if nothing were rounded."""
        bits, group, recent = core.args[9:12]
        return PackedSlot(
            slot.view, slot.node, slot.index, slot.keys, slot.values, slot.dtype, slot.level,
            bits, group, recent,  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def grows(self) -> bool:
        """Its buffers grow by blocks and not by tokens."""
        return False

    def describe(self) -> str:
        """What is held."""
        (heads, size), (_, width) = self.keys, self.values
        return (
            f"{self.view}: cache {self.index}, {heads} KV heads of {size} + {width}, {self.bits} bits in blocks of "
            f"{self.group}, the last {self.recent + self.group} whole"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        grid = {"bits": self.bits, "group": self.group, "recent": self.recent}
        return {**super().to_json(), "edit": "packed_slot", **grid}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The attention reads packed blocks and the ring, and returns what is new."""
        stage = Stage.of(rewriter, views.program)
        stage.buffers(self)
        core = rewriter.node(self.node)
        q, k, v, _, sinks, scale, _, _, softcap = core.args[:9]
        held = self._inputs(rewriter, stage)
        made = rewriter.call(
            ops.packed_attention.default,
            q, k, v, held["held_keys"], held["held_values"], stage.lengths, stage.positions, stage.spans,
            *(held[f"packed_{name}"] for name in PACKED), sinks, scale, softcap, self.bits, self.group, self.recent,
            before=core,
        )  # fmt: skip
        for name, node in (("keys", k), ("values", v)):
            rewriter.add_output(f"cache_{self.index}_new_{name}", node)  # type: ignore[arg-type]
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """As `apply`: that buffers hold what the text says is proven by decoding, not at random inputs."""
        self.apply(rewriter, views)

    def _inputs(self, rewriter: Rewriter, stage: Stage) -> dict[str, fx.Node]:
        """Inputs for the ring and for blocks, whose number is a dimension of its own."""
        blocks = f"{CAPACITY.name}_{self.group}"
        known: set[str] = rewriter.shared.setdefault("blocks", set())
        if blocks not in known:
            known.add(blocks)
            rewriter.add_dim(Dim(blocks, CAPACITY.low, CAPACITY.high, CAPACITY.hint))
        (heads, size), (_, width) = self.keys, self.values
        ring, scales = self.recent + self.group, groups(width, min(self.group, width))
        shapes: dict[str, tuple[tuple[str | int, ...], torch.dtype]] = {
            "held_keys": ((heads, ring, size), self.dtype),
            "held_values": ((heads, ring, width), self.dtype),
            "packed_keys": ((heads, blocks, size, row_bytes(self.group, self.bits)), torch.uint8),
            "packed_key_scale": ((heads, blocks, size, 1), self.dtype),
            "packed_key_low": ((heads, blocks, size, 1), self.dtype),
            "packed_values": ((heads, blocks, self.group, row_bytes(width, self.bits)), torch.uint8),
            "packed_value_scale": ((heads, blocks, self.group, scales), self.dtype),
            "packed_value_low": ((heads, blocks, self.group, scales), self.dtype),
        }
        return {
            name: rewriter.add_input(Input(f"cache_{self.index}_{name}", (stage.batch, *shape), dtype, "cache"))
            for name, (shape, dtype) in shapes.items()
        }


PACKED = ("keys", "key_scale", "key_low", "values", "value_scale", "value_low")
