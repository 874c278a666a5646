"""Attention over a quantised cache, in steps of decoding: packed blocks, then the last tokens in full precision.

Codes are unpacked in the loads, so that a step reads the bytes that the cache holds. What is packed for a query follows
from its place (`graphopt.ops.packed.first_exact`); a loop over blocks is followed by one over the ring and what is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from graphopt.backends.attention import base
from graphopt.backends.decode import StepEmitter
from graphopt.backends.index import ZERO, Index, quotient, same, text_of
from graphopt.backends.packed import on_grid
from graphopt.ops import packed_attention


def is_packed(node: fx.Node) -> bool:
    """Whether an attention over a quantised cache has a kernel: no new token may be read in few bits."""
    if node.target is not packed_attention:
        return False
    count, recent = node.args[0].meta["val"].shape[2], node.args[19]  # type: ignore[union-attr]
    return isinstance(count, int) and count <= recent  # type: ignore[operator]


class PackedEmitter(StepEmitter):
    """Coordinates of the text: `t` is a token, and the same one in blocks, in the ring and among the new ones."""

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        super().__init__(node, inside)
        self.bits, self.block, self.recent = (self.given[name] for name in ("bits", "group", "recent"))
        self.ring = self.recent + self.block
        self.one = same(self.queries, 1)
        self.coarse = True
        self.kept_half |= {base(self.given[name]) for name in ("k", "v")}

    def bounds(self) -> list[str]:
        """Tokens are counted through: those in few bits, then the others; where queries differ, some come twice."""
        lines = [*self.opening("lengths"), "held = lengths"]
        place = "held" if self.one else self.read(self.given["positions"], [self.b, self.row])
        lines += self.blocks[0].lines
        self.blocks[0].lines = []
        lines.append(f"edge = tl.maximum({place} + {1 - self.recent}, 0) // {self.block} * {self.block}")
        if self.one:
            return [*lines, "coarse = edge", "low = 0", "high = held + 1"]
        lines += ["coarse = tl.max(tl.where(m_in, edge, 0))",
                  "twice = coarse - tl.min(tl.where(m_in, edge, held))"]  # fmt: skip
        return [*lines, "low = 0", f"high = held + {text_of(self.queries)} + twice"]

    def body(self) -> tuple[list[str], list[str], list[str]]:
        """Two loops over keys that go on with one sum."""
        before, first, after = super().body()
        self.coarse = False
        self.stretches = first, self.stretch()
        more, self.blocks[0].lines = self.blocks[0].lines, []
        return [*before, *more], [], after

    def walk(self, loop: list[str]) -> list[str]:
        """Whole blocks, then the rest."""
        lines = []
        parts = (
            ("low", "tl.minimum(high, coarse)", ""),
            ("tl.maximum(low, coarse)", "high", "" if self.one else " - twice"),
        )
        for (start, end, shift), body in zip(parts, self.stretches, strict=True):
            lines += [f"for t_start in range({start}, {end}, TBLOCK):"]
            for name, side in (("t", "[None, :]"), ("t_down", "[:, None]")):
                lines += [f"    {name} = t_start{shift} + tl.arange(0, TBLOCK){side}",
                          f"    {name}_in = {name} < {end}{shift}"]  # fmt: skip
            lines += [f"    {line}" for line in body]
        return lines

    def visible(self, say: Callable[[str], None]) -> list[str]:
        """What is before a query's edge is read in few bits, what is behind it whole."""
        if self.one:
            return ["t_in"]
        if self.coarse:
            return ["t_in", "(t < edge)"]
        return ["t_in", f"(((t < held) & (t >= edge)) | ({self.sees_new()}))"]

    def key_tile(self, t: Index, d: Index) -> str:
        """Features of keys, by blocks or whole."""
        if not self.coarse:
            return self._whole("keys", "k", t, d, "[DBLOCK, TBLOCK]")
        stored = [self.given[name] for name in ("packed_keys", "key_scale", "key_low")]
        place = [self.b, self.kv, quotient(t, self.block), d, Index(f"({t.text} % {self.block})", t.axes)]
        text, axes = on_grid(self, stored, self.bits, self.block, place)
        return self.line(text, "entry", axes)

    def value_tile(self, t: Index, e: Index) -> str:
        """Features of values, by blocks or whole."""
        if not self.coarse:
            return self._whole("values", "v", t, e, "[TBLOCK, EBLOCK]")
        stored = [self.given[name] for name in ("packed_values", "value_scale", "value_low")]
        place = [self.b, self.kv, quotient(t, self.block), Index(f"({t.text} % {self.block})", t.axes), e]
        text, axes = on_grid(self, stored, self.bits, self.block, place)
        return self.line(text, "entry", axes)

    def _whole(self, old: str, new: str, t: Index, feature: Index, shape: str) -> str:
        """What the ring holds, or what is new."""
        count = text_of(self.queries)
        is_held = Index(f"({t.text} < held)", t.axes)
        is_new = Index(f"({t.text} >= held) & ({t.text} < held + {count})", t.axes)
        slot = Index(f"({t.text} % {self.ring})", t.axes)
        behind = ZERO if self.one else Index(f"({t.text} - held)", t.axes)
        first = self.read(self.given[old], [self.b, self.kv, slot, feature], shape, is_held)
        other = self.read(self.given[new], [self.b, self.kv, behind, feature], shape, is_new)
        return f"tl.where({t.text} < held, {first}.to(DOT), {other}.to(DOT))"
