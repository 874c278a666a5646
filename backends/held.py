"""Attention in which KV heads are bounded: over what they hold, in steps of decoding, and as visibility over a whole text.

A bounded head reads the slots that are filled and the new entries, never a growing buffer: its cost is that of its own
length. What an entry's place in the text is follows from its slot (`graphopt.ops.bounded.held_places`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from graphopt.backends.attention import AttentionEmitter, base, finish
from graphopt.backends.decode import StepEmitter
from graphopt.backends.index import ZERO, Index, Unfusable, linear, same, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, call_text, kernel_text
from graphopt.backends.loops import spread
from graphopt.backends.pointwise import SIGNATURE
from graphopt.ops import bounded_attention, heavy_weights, held_attention

MOST_HEADS = 62  # bits of a number that says which heads are bounded


def is_bounded(node: fx.Node) -> bool:
    """Whether a bounded attention has a kernel: heavy hitters are decided token by token, and learnt gates mix two."""
    if node.target is heavy_weights:
        return same(node.args[0].meta["val"].shape[2], 1)  # type: ignore[union-attr]
    if node.target is not bounded_attention:
        return node.target is held_attention
    gates, heavy, compensate = node.args[10], node.args[14], node.args[15]
    return gates is None and not heavy and not compensate and node.args[1].meta["val"].shape[1] <= MOST_HEADS  # type: ignore[union-attr]


class HeldEmitter(StepEmitter):
    """Slots 0 .. held - 1 of a bounded head, then the new entries; `place` is where in the text a key stands."""

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        super().__init__(node, inside)
        self.sink, self.recent = self.given["sink"], self.given["recent"]
        self.turned = self.given.get("renumbered")
        self.kept_half |= {base(self.given.get(name)) for name in ("k", "v")} - {None}
        self.compensate = self.given.get("compensate", False)
        if self.compensate:
            self.scratch = ("numbers", "gone_keys", "gone_values")

    def bounds(self) -> list[str]:
        """Slots that are filled, and all new entries."""
        size = self.sink + self.recent
        lines = [*self.opening("lengths"), f"held = tl.minimum(lengths, {size})"]
        return [*lines, "low = 0", f"high = held + {text_of(self.queries)}"]

    def place(self, say: Callable[[str], None]) -> None:
        """A slot of the ring holds the last token of its remainder."""
        own = self.read(self.given["positions"], [self.b, self.index_of_new()], guard=self.is_new)
        ring = f"t + {self.recent} * (tl.maximum(lengths - 1 - t, 0) // {self.recent})"
        ring = f"tl.where(t < {self.sink}, t, {ring})"
        say(f"place = tl.where(t < held, {ring}, {own})")

    def score(self, say: Callable[[str], None], keys: str) -> None:
        """Among the first tokens queries may stand elsewhere."""
        say(f"keys = {keys}")
        scale = repr(self.given["scale"])
        say(f"logits = tl.dot(query, keys{self.exact()}) * {scale}")
        if self.turned is not None:
            say(f"logits = tl.where(place < {self.sink}, tl.dot(turned, keys{self.exact()}) * {scale}, logits)")
        self.cap(say)

    def visible(self, say: Callable[[str], None]) -> list[str]:
        """The first tokens, and those near enough to the query."""
        now = self.read(self.given["positions"], [self.b, self.row])
        seen = "t_in" if same(self.queries, 1) else f"t_in & ((t < held) | ({self.sees_new()}))"
        shown = f"((place < {self.sink}) | ({now} - place < {self.recent}))"
        if self.compensate:
            say(f"seen = m_in & {seen}")
            say(f"near = {shown}")
            say("gone = (seen & (near == 0)).to(tl.float32)")
            return ["seen", "near"]
        return [seen, shown]

    def key_tile(self, t: Index, d: Index) -> str:
        """What the slots hold, or what is new."""
        return self._either("keys", "k", t, d, "[DBLOCK, TBLOCK]")

    def value_tile(self, t: Index, e: Index) -> str:
        """What the slots hold, or what is new."""
        return self._either("values", "v", t, e, "[TBLOCK, EBLOCK]")

    def _either(self, old: str, new: str, t: Index, feature: Index, shape: str) -> str:
        is_held = Index(f"({t.text} < held)", t.axes)
        is_new = Index(f"({t.text} >= held) & ({t.text} < held + {text_of(self.queries)})", t.axes)
        behind = ZERO if same(self.queries, 1) else Index(f"({t.text} - held)", t.axes)
        first = self.read(self.given[old], [self.b, self.kv, t, feature], shape, is_held)
        other = self.read(self.given[new], [self.b, self.kv, behind, feature], shape, is_new)
        return f"tl.where({t.text} < held, {first}.to(DOT), {other}.to(DOT))"

    def opened(self) -> list[str]:
        """Queries at their places inside the cache; sums of what has gone."""
        lines = turned_lines(self, self.turned)
        if self.compensate:
            lines += ["number = tl.zeros([MBLOCK, 1], tl.float32)",
                      "gone_key = tl.zeros([MBLOCK, DBLOCK], tl.float32)",
                      "gone_value = tl.zeros([MBLOCK, EBLOCK], tl.float32)"]  # fmt: skip
        return lines

    def gathered(self, values: str) -> list[str]:
        """Sums of keys and values that are no longer seen."""
        if not self.compensate:
            return []
        return ["number += tl.sum(gone, 1)[:, None]",
                f"gone_key += tl.dot(gone.to(DOT), tl.trans(keys){self.exact()})",
                f"gone_value += tl.dot(gone.to(DOT), {values}{self.exact()})"]  # fmt: skip

    def kept(self, part: str) -> list[str]:
        """What a part stores of those sums."""
        if not self.compensate:
            return []
        return [f"tl.store(numbers + {part}, number, mask=m_in)",
                f"tl.store(gone_keys + ({part}) * {self.features} + d, gone_key, mask=m_in & d_in)",
                f"tl.store(gone_values + ({part}) * {self.width} + e, gone_value, mask=m_in & e_in)"]  # fmt: skip

    def joined(self) -> list[str]:
        """One entry that stands for all that has gone, its logarithmic number added to its logit."""
        if not self.compensate:
            return []
        self.blocks[0].memo.clear()
        d, e = self.index("d", self.features), self.index("e", self.width)
        query = self.read(self.q, [self.b, self.h, self.row, d], "[MBLOCK, DBLOCK]")
        size = Index(str(self.sink + self.recent))
        base_key = self.read(self.given["keys"], [self.b, self.kv, size, d])
        base_value = self.read(self.given["values"], [self.b, self.kv, size, e])
        opening = self.opening("lengths")
        lines = ["d = tl.arange(0, DBLOCK)[None, :]", f"d_in = d < {self.features}", *opening,
                 f"before = tl.maximum(lengths - {size.text}, 0).to(tl.float32)",
                 "number = tl.zeros([MBLOCK, 1], tl.float32)",
                 "gone_key = tl.zeros([MBLOCK, DBLOCK], tl.float32)",
                 "gone_value = tl.zeros([MBLOCK, EBLOCK], tl.float32)",
                 "for split in range(SPLITS):",
                 "    number += tl.load(numbers + part + split, mask=m_in, other=0.0)",
                 f"    gone_key += tl.load(gone_keys + (part + split) * {self.features} + d, mask=m_in & d_in, other=0.0)",
                 f"    gone_value += tl.load(gone_values + (part + split) * {self.width} + e, mask=m_in & e_in, other=0.0)",
                 "number += before",
                 "# What an empty slot holds has no meaning, not even times zero.",
                 f"gone_key += tl.where(before > 0, before * {base_key}, 0.0)",
                 f"gone_value += tl.where(before > 0, before * {base_value}, 0.0)",
                 "share = 1.0 / tl.maximum(number, 1.0)",
                 f"column = tl.sum({query} * gone_key * share, 1)[:, None] * {self.given['scale']!r}"]  # fmt: skip
        self.cap(lines.append, "column")
        return [*lines, 'column = tl.where(number > 0, column + tl.log(tl.maximum(number, 1.0)), -float("inf"))',
                "top = tl.maximum(best, column)", 'base = tl.where(top == -float("inf"), 0.0, top)',
                "kept = tl.exp(best - base)", "weight = tl.exp(column - base)", "total = total * kept + weight",
                "acc = acc * kept + weight * gone_value * share", "best = top"]  # fmt: skip


class BoundedEmitter(AttentionEmitter):
    """A whole text of which the KV heads `heads` see the first tokens and the last ones, the others everything.

    Blocks of keys that lie between the two are skipped where places are those of the text; with padding they are counted.
    """

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        super().__init__(node, inside)
        if not same(self.queries, self.keys):
            raise Unfusable("a bounded attention of other queries than keys")
        self.sink, self.recent = self.given["sink"], self.given["recent"]
        self.some = len(set(self.given["heads"])) < self.kv_heads
        self.turned = self.given["renumbered"] if self.given["heads"] else None
        if self.mask is not None:
            self.extras = (("places", "*i64"),)

    def preparing(self) -> list[str]:
        """Places of padded texts are counted before the launch."""
        return [] if self.mask is None else [f"places = ({self.inputs[self.mask]} != 0).to(torch.int64).cumsum(1) - 1"]

    def bounds(self) -> list[str]:
        """All keys up to the last query, and how many blocks no query of the tile sees."""
        lines = super().bounds()
        if self.some:
            bits = sum(1 << head for head in range(self.kv_heads) if head not in self.given["heads"])
            lines.append(f"free = (({bits} >> kv) & 1) != 0")
        if self.mask is None:
            near = f"tl.maximum(m_start - {self.recent - 1}, 0) // TBLOCK * TBLOCK"
            lines.append(f"first = tl.cdiv({self.sink}, TBLOCK) * TBLOCK")
            lines.append(f"skipped = tl.maximum({near} - first, 0)")
            if self.some:
                lines.append("skipped = tl.where(free, 0, skipped)")
            lines.append("high = tl.maximum(high - skipped, 0)")
        else:
            lines.append(f"own = tl.load(places + b * {text_of(self.keys)} + m, mask=m_in, other=0)")
        return lines

    def walk(self, loop: list[str]) -> list[str]:
        """The loop over blocks of keys, which jumps over those between the first tokens and the last."""
        if self.mask is not None:
            return super().walk(loop)
        lines = super().walk(["place = t", *loop])
        lines[0] = "for start in range(low, high, TBLOCK):"
        lines.insert(1, "    t_start = start + tl.where(start >= first, skipped, 0)")
        return [line.replace("< high", "< high + skipped") for line in lines]

    def place(self, say: Callable[[str], None]) -> None:
        """Where a key stands among the real tokens."""
        if self.mask is not None:
            say(f"place = tl.load(places + b * {text_of(self.keys)} + t, mask=t_in, other=0)")

    def visible(self, say: Callable[[str], None]) -> list[str]:
        """The first tokens and the last ones, in bounded heads."""
        conditions = super().visible(say)
        own = self.row.text if self.mask is None else "own"
        if self.given["heads"]:
            shown = f"(place < {self.sink}) | ({own} - place < {self.recent})"
            conditions.append(f"(free | {shown})" if self.some else f"({shown})")
        return conditions

    def score(self, say: Callable[[str], None], keys: str) -> None:
        """Among the first tokens queries of bounded heads may stand elsewhere."""
        say(f"keys = {keys}.to(DOT)")
        scale = repr(self.given["scale"])
        say(f"logits = tl.dot(query, keys{self.exact()}) * {scale}")
        if self.turned is not None:
            first = f"(place < {self.sink})" + (" & (free == 0)" if self.some else "")
            say(f"logits = tl.where({first}, tl.dot(turned, keys{self.exact()}) * {scale}, logits)")
        self.cap(say)

    def opened(self) -> list[str]:
        """Queries at their places inside a cache."""
        return turned_lines(self, self.turned)


class WeighedEmitter(HeldEmitter):
    """Attention whose weights are known, or are to be: every slot, the dead ones included, then the new entries."""

    def bounds(self) -> list[str]:
        """All slots."""
        size = text_of(self.keys)
        return [f"held = {size}", "low = 0", f"high = held + {text_of(self.queries)}"]

    def column(self) -> Index:
        """The place of a key among the weights."""
        return Index("t", frozenset("t"))


def turned_lines(e: AttentionEmitter, turned: fx.Node | None) -> list[str]:
    """Lines that load queries as they stand at other places."""
    if turned is None:
        return []
    text = e.read(turned, [e.b, e.h, e.row, e.index("d", e.features)], "[MBLOCK, DBLOCK]")
    lines = [*e.blocks[0].lines, f"turned = {text}.to(DOT)"]
    e.blocks[0].lines = []
    return lines


def build_weighed(node: fx.Node, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of attention with given weights: a product of them with the values."""
    e = WeighedEmitter(node, nodes)
    feature = e.index("e", e.width)
    bounds = e.bounds()
    with e.loop("t") as loop:
        indices = [e.b, e.h, e.row, e.column()]
        weights = e.read(e.given["weights"], indices, "[MBLOCK, TBLOCK]")
        values = e.value_tile(Index("t_down", frozenset({"t_down"})), feature)
        loop.lines.append(f"acc += tl.dot({weights}.to(DOT), {values}{e.exact()})")
    lines = ["acc = tl.zeros([MBLOCK, EBLOCK], tl.float32)", *e.walk(loop.lines), "result = acc"]
    lines += e.stores(outputs, [f"out{i}" for i in range(len(outputs))])
    body = [*bounds, *lines]
    # There is one tile of rows for a KV head: features are split over programs instead.
    tile = {"MBLOCK": 16, "TBLOCK": 64, "EBLOCK": 32}
    start = ["e = tl.program_id(2) * EBLOCK + tl.arange(0, EBLOCK)[None, :]", f"e_in = e < {text_of(e.width)}"]
    return _by_tiles(e, [*start, *body], tile, f", triton.cdiv({e.width}, EBLOCK)", "weighed_attention", nodes, outputs)


def build_weights(node: fx.Node) -> Kernel:
    """The kernel of what heavy-hitter heads weigh one new token and what they hold: two walks over the keys."""
    e = WeighedEmitter(node)
    d, d_down = e.index("d", e.features), e.index("d_down", e.features)
    bounds = e.bounds()
    query = e.read(e.q, [e.b, e.h, e.row, d], "[MBLOCK, DBLOCK]")
    before = [*e.blocks[0].lines, f"query = {query}.to(DOT)"]
    e.blocks[0].lines = []
    walks = []
    for final in (False, True):
        with e.loop("t") as loop:
            say = loop.lines.append
            keys = e.key_tile(e.column(), d_down)
            say(f"logits = tl.dot(query, {keys}{e.exact()}) * {e.given['scale']!r}")
            e.cap(say)
            alive = e.read(e.given["places"], [e.b, e.kv, e.column()], guard=Index("(t < held)", frozenset("t")))
            say(f'logits = tl.where(t_in & ((t >= held) | ({alive} >= 0)), logits, -float("inf"))')
            if final:
                out = linear([e.b, e.h, e.row, e.column()], e.sizes(node))
                say(f"tl.store(out0 + {spread(out, 'm')}, tl.exp(logits - best) / total, mask=m_in & t_in)")
            else:
                loop.lines += ["top = tl.maximum(best, tl.max(logits, 1)[:, None])",
                               'base = tl.where(top == -float("inf"), 0.0, top)',
                               "total = total * tl.exp(best - base) + tl.sum(tl.exp(logits - base), 1)[:, None]",
                               "best = top"]  # fmt: skip
        walks.append(e.walk(loop.lines))
    start = ['best = tl.full([MBLOCK, 1], -float("inf"), tl.float32)', "total = tl.zeros([MBLOCK, 1], tl.float32)"]
    if e.sinks is not None:
        sink = e.read(e.sinks, [e.h])
        start = [*e.blocks[0].lines, f"best = tl.full([MBLOCK, 1], 0.0, tl.float32) + {sink}",
                 "total = tl.full([MBLOCK, 1], 1.0, tl.float32)"]  # fmt: skip
        e.blocks[0].lines = []
    tile = {"MBLOCK": 16, **e.tile(), "TBLOCK": 32}
    body = [*e.feature_lines()[:4], *bounds, *before, *start, *walks[0], *walks[1]]
    return _by_tiles(e, body, {k: v for k, v in tile.items() if k != "EBLOCK"}, "", "heavy_weights", [node], [node])


def _by_tiles(
    e: WeighedEmitter,
    body: list[str],
    tile: dict[str, int],
    more: str,
    template: str,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
) -> Kernel:
    """A kernel with one program for a tile of rows of a KV head, and what `more` of a grid says."""
    signature = Signature(e, outputs)
    rows = str(e.group) if same(e.queries, 1) else f"({e.group} * {text_of(e.queries)})"
    head = [f"b = tl.program_id(0) // {e.kv_heads}", f"kv = tl.program_id(0) % {e.kv_heads}",
            "m = tl.program_id(1) * MBLOCK + tl.arange(0, MBLOCK)[:, None]", f"m_in = m < {rows}"]  # fmt: skip
    names = [*tile, "DOT"]
    text = kernel_text("kernel", [*signature.names, *(f"{n}: tl.constexpr" for n in names)], [*head, *body])
    grid = f"({text_of(e.batch)} * {e.kv_heads}, triton.cdiv({rows}, MBLOCK){more})"
    passed = ", ".join([*signature.names, *(f"{n}={n}" for n in names), "num_warps=num_warps"])
    kind = SIGNATURE[e.q.meta["val"].dtype]
    entry = Entry("kernel", signature.types(), (*tile.items(), ("DOT", kind)), 4)
    return finish(e, signature, [text], call_text(f"kernel[{grid}]", passed), tile, [entry], template, nodes, outputs)
