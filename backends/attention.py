"""Attention kernels, generated from the attributes of `graphopt::attention`: what an attribute leaves out is not written.

One program computes a block of queries of one head over the keys that it may see, in one pass with a running maximum
(online softmax, arXiv:1805.02867; the tiling is that of FlashAttention-2, arXiv:2307.08691). One query, and attention over
a cache, split the keys over programs: see decode.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.backends.emit import JOINS, RESHAPES, TAKE, VIEWS, Emitter, Value, aten, packet
from graphopt.backends.index import ZERO, Index, Unfusable, linear, reshape, same, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, assemble, call_text, describe, kernel_text
from graphopt.backends.loops import spread
from graphopt.backends.packed import UNPACKED
from graphopt.backends.pointwise import CASTS, SIGNATURE, TRITON
from graphopt.ops import (
    attention,
    bounded_attention,
    cached_attention,
    heavy_weights,
    held_attention,
    packed_attention,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST_FEATURES = 256
CORES = (attention, cached_attention, bounded_attention, held_attention, heavy_weights, packed_attention)


def operands(node: fx.Node) -> dict[str, Any]:
    """What an attention is given, by the names of its op."""
    schema = node.target._schema  # type: ignore[union-attr]
    return {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=True)}


def _has_template(node: fx.Node) -> bool:
    from graphopt.backends.held import is_bounded
    from graphopt.backends.packed_cache import is_packed

    return node.target in (attention, cached_attention) or is_bounded(node) or is_packed(node)


def is_attention(node: fx.Node) -> bool:
    """Whether the generator writes a node as attention: known head sizes, a mask of two or four axes."""
    if node.target not in CORES or not _has_template(node):
        return False
    given = operands(node)
    q, mask = given["q"], given.get("mask")
    v = given.get("v", q)
    sizes = (q.meta["val"].shape[3], v.meta["val"].shape[3], q.meta["val"].shape[1])
    if any(not isinstance(size, int) for size in sizes) or not 1 < min(sizes[:2]) <= max(sizes[:2]) <= MOST_FEATURES:
        return False
    if q.meta["val"].dtype not in FLOATS or len({n.meta["val"].dtype for n in (q, given["k"], v)}) > 1:
        return False
    return not isinstance(mask, fx.Node) or mask.meta["val"].dim() in (2, 4)


class AttentionEmitter(Emitter):
    """Coordinates of one attention: rows `m`, keys `t` (across and `t_down`), features `d` and `e`.

    Rows are the queries of one head, or, when there is one query, the heads that share a KV head.
    """

    loop_of = {"t_down": "t"}
    extras: tuple[tuple[str, str], ...] = ()  # arguments beside inputs and outputs, with their types

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        axes = ("m", "t", "t_down", "d", "d_down", "e")
        super().__init__([node, *inside], {axis: f"{axis}_in" for axis in axes})
        self.node = node
        self.given = given = operands(node)
        self.q, self.k, self.v = given["q"], given.get("keys", given["k"]), given.get("values", given.get("v"))
        self.mask, self.sinks = given.get("mask"), given["sinks"]
        self.window = given.get("window")
        _, self.heads, self.queries, self.features = self.sizes(self.q)
        self.batch, self.kv_heads, self.keys, _ = self.sizes(self.k)
        self.width = self.features if self.v is None else self.sizes(self.v)[3]
        if not isinstance(self.kv_heads, int) or self.heads % self.kv_heads:
            raise Unfusable("attention whose heads are not known")
        self.group = self.heads // self.kv_heads
        self.b = Index("b") if not same(self.batch, 1) else ZERO
        self.kv = Index("kv") if self.kv_heads > 1 else ZERO
        self.row, self.h = self.rows()
        self.kept_half = {base(each) for each in (self.q, self.k, self.v)} - {base(n) for n in (self.mask, self.sinks)}

    def rows(self) -> tuple[Index, Index]:
        """The query and the head of a tile's row."""
        m = Index("m", frozenset("m"))
        if same(self.queries, 1):
            return ZERO, Index(f"(kv * {self.group} + m)", m.axes) if self.heads > 1 else ZERO
        return m, Index("h") if self.heads > 1 else ZERO

    def index(self, axis: str, size: Any) -> Index:
        """A coordinate over one tile axis."""
        return ZERO if same(size, 1) else Index(axis, frozenset({axis}))

    def read(self, node: fx.Node, indices: Sequence[Index], shape: str = "", guard: Index | None = None) -> str:
        """The text of elements of an operand; spread to `shape` where the operand lacks an axis of it."""
        sizes = self.sizes(node)
        value = self.value(node, [ZERO if same(s, 1) else i for i, s in zip(indices, sizes, strict=True)], guard)
        if shape and len(value.axes) < 2:
            return f"tl.broadcast_to({value.text}, {shape})"
        return value.text

    def visible(self, say: Callable[[str], None]) -> list[str]:
        """Conditions under which a row sees a key."""
        shift = "" if same(self.queries, self.keys) else f" + ({text_of(self.keys)} - {text_of(self.queries)})"
        place = f"{self.row.text}{shift}"
        conditions = ["t_in"]
        if self.given["causal"]:
            conditions.append(f"(t <= {place})")
        if self.window is not None:
            conditions.append(f"(t > {place} - {self.window})")
            if not self.given["causal"]:
                conditions.append(f"(t < {place} + {self.window})")
        return conditions

    def mask_column(self) -> Index:
        """Where a mask holds what it says of a key."""
        return self.index("t", self.keys)

    def bounds(self) -> list[str]:
        """The first and last key that some row of the tile sees."""
        keys = text_of(self.keys)
        shift = f"({keys} - {text_of(self.queries)})"
        one = same(self.queries, 1)
        first = shift if one else f"m_start + {shift}"
        last = f"{shift} + 1" if one else f"m_start + MBLOCK + {shift}"
        low, high = "low = 0", f"high = {keys}"
        if self.given["causal"]:
            high = f"high = tl.minimum({keys}, {last})"
        if self.window is not None:
            low = f"low = tl.maximum(0, {first} - {self.window - 1})"
            if not self.given["causal"]:
                high = f"high = tl.minimum({keys}, {last} + {self.window - 1})"
        return [low, high]

    def body(self) -> tuple[list[str], list[str], list[str]]:
        """Lines before the loop over keys, the loop's, and those after it."""
        query = self.read(self.q, [self.b, self.h, self.row, self.index("d", self.features)], "[MBLOCK, DBLOCK]")
        loop = self.stretch()
        before = [*self.blocks[0].lines, f"query = {query}.to(DOT)"]
        before += [
            'best = tl.full([MBLOCK, 1], -float("inf"), tl.float32)',
            "total = tl.zeros([MBLOCK, 1], tl.float32)",
        ]
        before.append("acc = tl.zeros([MBLOCK, EBLOCK], tl.float32)")
        self.blocks[0].lines = []
        before += self.opened()
        after: list[str] = []
        if self.sinks is not None:
            sink = self.read(self.sinks, [self.h])
            after = [*self.blocks[0].lines, f"top = tl.maximum(best, {sink})", "kept = tl.exp(best - top)"]
            after += [f"total = total * kept + tl.exp({sink} - top)", "acc = acc * kept", "best = top"]
            self.blocks[0].lines = []
        return before, loop, after

    def stretch(self) -> list[str]:
        """The lines of a loop over keys."""
        t, d_down, t_down = (
            self.index("t", self.keys), self.index("d_down", self.features), self.index("t_down", self.keys)
        )  # fmt: skip
        with self.loop("t") as loop:
            say = loop.lines.append
            self.place(say)
            self.score(say, self.key_tile(t, d_down))
            conditions = self.visible(say)
            if self.mask is not None:
                found = self.mask.meta["val"]
                column = self.mask_column()
                shown = self.read(
                    self.mask, [self.b, column] if found.dim() == 2 else [self.b, self.h, self.row, column]
                )
                if found.dim() == 2 or found.dtype == torch.bool:
                    conditions.append(f"({shown} != 0)")
                else:
                    say(f"logits += {shown}")
            say(f'logits = tl.where({" & ".join(conditions)}, logits, -float("inf"))')
            loop.lines += [
                "top = tl.maximum(best, tl.max(logits, 1)[:, None])",
                "# A row that sees nothing yet has no maximum: 0 keeps its weights at exp(-inf) = 0.",
                'base = tl.where(top == -float("inf"), 0.0, top)',
                "weights = tl.exp(logits - base)",
                "kept = tl.exp(best - base)",
                "total = total * kept + tl.sum(weights, 1)[:, None]",
            ]
            values = self.value_tile(t_down, self.index("e", self.width))
            loop.lines += self.gathered(values)
            loop.lines += [f"acc = acc * kept + tl.dot(weights.to(DOT), {values}.to(DOT){self.exact()})", "best = top"]
        return loop.lines

    def preparing(self) -> list[str]:
        """Lines of the launch that make the extra arguments."""
        return []

    def opened(self) -> list[str]:
        """Further lines before the loop."""
        return []

    def gathered(self, values: str) -> list[str]:
        """Further lines of the loop, once values are there."""
        return []

    def kept(self, part: str) -> list[str]:
        """Lines that store further results of a part of the keys."""
        return []

    def joined(self) -> list[str]:
        """Lines that take what parts stored into account once they are joined."""
        return []

    def place(self, say: Callable[[str], None]) -> None:
        """Say where in the text a key stands, for attention that asks."""

    def key_tile(self, t: Index, d: Index) -> str:
        """A block of keys, features down."""
        return self.read(self.k, [self.b, self.kv, t, d], "[DBLOCK, TBLOCK]")

    def value_tile(self, t: Index, e: Index) -> str:
        """A block of values, keys down."""
        return self.read(self.v, [self.b, self.kv, t, e], "[TBLOCK, EBLOCK]")

    def score(self, say: Callable[[str], None], keys: str) -> None:
        """Say the logits of the tile."""
        say(f"logits = tl.dot(query, {keys}.to(DOT){self.exact()}) * {self.given['scale']!r}")
        self.cap(say)

    def cap(self, say: Callable[[str], None], name: str = "logits") -> None:
        """Cap logits where the op does."""
        cap = self.given["softcap"]
        if cap is not None:
            self.helpers.add("tanh")
            say(f"{name} = {cap!r} * tanh({name} / {cap!r})")

    def walk(self, loop: list[str]) -> list[str]:
        """The loop over blocks of keys."""
        lines = [
            "for t_start in range(low, high, TBLOCK):",
            "    t = t_start + tl.arange(0, TBLOCK)[None, :]",
            "    t_in = t < high",
            "    t_down = t_start + tl.arange(0, TBLOCK)[:, None]",
            "    t_down_in = t_down < high",
        ]
        return lines + [f"    {line}" for line in loop]

    def feature_lines(self) -> list[str]:
        """Coordinates of features: across and down for keys, across for values."""
        lines = []
        for name, block, size in (
            ("d", "DBLOCK", self.features),
            ("d_down", "DBLOCK", self.features),
            ("e", "EBLOCK", self.width),
        ):
            side = "[:, None]" if name.endswith("down") else "[None, :]"
            lines += [f"{name} = tl.arange(0, {block}){side}", f"{name}_in = {name} < {text_of(size)}"]
        return lines

    def tile(self) -> dict[str, int]:
        """Block sizes over keys and features."""
        return {"TBLOCK": 64, "DBLOCK": power(self.features), "EBLOCK": power(self.width)}

    def known(self) -> list[Index]:
        """The coordinates of a tile's result."""
        return [self.b, self.h, self.row, self.index("e", self.width)]

    def write(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """What stands behind the attention reads the tile's result."""
        if node is not self.node:
            return super().write(node, indices, guard)
        if [i.text for i in indices] != [i.text for i in self.known()]:
            raise Unfusable("attention that is read at other coordinates than it is stored")
        return Value("result", node.meta["val"].dtype, frozenset({"m", "e"}))

    def stores(self, outputs: Sequence[fx.Node], names: Sequence[str]) -> list[str]:
        """Lines that compute and store what a group gives, from the tile's result."""
        self.blocks[0].memo.clear()
        stored = []
        for node, name in zip(outputs, names, strict=True):
            indices = self.coordinates(node)
            value = self.value(node, indices)
            contiguous = node.meta["val"].is_contiguous()
            offset = linear(indices, self.sizes(node)) if contiguous else self.offset(node, name, indices)
            text = value.read(node.meta["val"].dtype)
            stored.append(f"tl.store({name} + {spread(offset, 'm')}, {text}, mask=m_in & e_in)")
        lines, self.blocks[0].lines = self.blocks[0].lines, []
        return [*lines, *stored]

    def coordinates(self, node: fx.Node) -> list[Index]:
        """The tile's coordinates in what is computed from the attention, element by element."""
        if node is self.node:
            return self.known()
        sources = [n for n in node.all_input_nodes if self.behind(n)]
        if not sources:
            raise Unfusable("a result that does not stand behind the attention")
        before, after = self.sizes(sources[0]), self.sizes(node)
        indices, kind = self.coordinates(sources[0]), packet(node)
        if kind in RESHAPES:
            return reshape(indices, before, after)
        if kind in (aten.permute, aten.transpose):
            order = list(range(len(before)))
            if kind is aten.permute:
                order = [int(axis) % len(order) for axis in node.args[1]]  # type: ignore[union-attr, arg-type]
            else:
                a, b = (int(axis) % len(order) for axis in node.args[1:3])  # type: ignore[arg-type]
                order[a], order[b] = order[b], order[a]
            return [indices[axis] for axis in order]
        if node not in self.inside or len(before) != len(after) or not all(map(same, before, after)):
            raise Unfusable("a result of another shape than what it is computed from")
        return indices

    def behind(self, node: fx.Node) -> bool:
        """Whether a node of the group, or a view, is computed from the attention."""
        if node is self.node:
            return True
        if node not in self.inside and packet(node) not in VIEWS:
            return False
        return any(map(self.behind, node.all_input_nodes))

    def exact(self) -> str:
        """What products of float32 tiles are asked for: no shortened mantissas."""
        return ', input_precision="ieee"' if self.q.meta["val"].dtype == torch.float32 else ""


def base(node: Any) -> Any:
    """What a view, or a choice of tokens, reads in the end."""
    while isinstance(node, fx.Node) and packet(node) in (TAKE, *VIEWS):
        node = node.args[0]
    return node


def power(size: int) -> int:
    """The block that holds `size`: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def check(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Node:
    """The attention of a group; raises Unfusable where what comes before it is more than its loads should compute."""
    cores = [node for node in nodes if node.target in CORES]
    if len(cores) != 1:
        raise Unfusable("attentions stand apart")
    (core,) = cores
    if len(nodes) > 1 and core.target in (heavy_weights, bounded_attention):
        raise Unfusable("attention stands alone")
    given = operands(core)
    loaded = _sources([given.get(name) for name in ("q", "k", "v")], nodes)
    if any(packet(node) not in (TAKE, *UNPACKED, *JOINS, *CASTS) for node in loaded):
        raise Unfusable("a computation that every block of an attention would repeat")
    free = loaded | _sources([given.get("mask")], nodes)
    others = [given[name] for name in given if name not in ("q", "k", "v", "mask")]
    if _sources(others, nodes) - free or any(node in free for node in outputs):
        raise Unfusable("what an attention reads is stored")
    return core


def _sources(starts: Sequence[Any], nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes of a group that some operands are computed from, found through views."""
    found: set[fx.Node] = set()
    stack = [node for node in starts if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in nodes:
            found.add(node)
        if node in nodes or packet(node) in VIEWS:
            stack += node.all_input_nodes
    return found


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of one attention with masks and unpacking before it, and pointwise results behind; else raises Unfusable."""
    node = check(nodes, outputs)
    if node.target is not attention:
        from graphopt.backends import held

        if node.target is heavy_weights:
            return held.build_weights(node)
        if node.target is held_attention and node.args[8] is not None:
            return held.build_weighed(node, nodes, outputs)
    if node.target in (cached_attention, held_attention, packed_attention) or (
        node.target is attention and same(node.args[0].meta["val"].shape[2], 1)  # type: ignore[union-attr]
    ):
        from graphopt.backends.decode import build_split

        return build_split(node, nodes, outputs)
    e = AttentionEmitter(node, nodes) if node.target is attention else held.BoundedEmitter(node)
    bounds = e.bounds()
    before, loop, after = e.body()
    signature = Signature(e, outputs)
    stores = e.stores(outputs, signature.out_names)
    extras = [name for name, _ in e.extras]
    tile = {"MBLOCK": 64, **e.tile()}
    body = [
        "m_start = tl.program_id(0) * MBLOCK",
        "m = m_start + tl.arange(0, MBLOCK)[:, None]",
        f"m_in = m < {text_of(e.queries)}",
        f"b = tl.program_id(1) // {e.heads}",
        f"h = tl.program_id(1) % {e.heads}",
        f"kv = h // {e.group}",
        *e.feature_lines(),
        *bounds,
        *before,
        *e.walk(loop),
        *after,
        "result = acc / tl.where(total == 0.0, 1.0, total)",
        *stores,
    ]
    names = [*tile, "DOT"]
    text = kernel_text("kernel", [*signature.names, *extras, *(f"{n}: tl.constexpr" for n in names)], body)
    arguments = ", ".join([*signature.names, *extras, *(f"{n}={n}" for n in names), "num_warps=num_warps"])
    grid = f"(triton.cdiv({text_of(e.queries)}, MBLOCK), {text_of(e.batch)} * {e.heads})"
    dot = SIGNATURE[e.q.meta["val"].dtype]
    entry = Entry("kernel", (*signature.types(), *e.extras), (*tile.items(), ("DOT", dot)), 4)
    call = [*e.preparing(), *call_text(f"kernel[{grid}]", arguments)]
    return finish(e, signature, [text], call, tile, [entry], "attention", nodes, outputs)


def finish(
    e: AttentionEmitter,
    signature: Signature,
    functions: list[str],
    call: list[str],
    tile: dict[str, Any],
    entries: list[Entry],
    template: str,
    nodes: Sequence[fx.Node] = (),
    outputs: Sequence[fx.Node] = (),
) -> Kernel:
    """The kernel of what was written; of the attention alone where no nodes are given."""
    nodes, outputs = nodes or [e.node], outputs or [e.node]
    dot = TRITON[e.q.meta["val"].dtype]
    defaults = f"*, {', '.join(f'{k}={v}' for k, v in tile.items())}, DOT={dot}, num_warps=4"
    launch, scalars = signature.launch(call, defaults)
    source = assemble(describe(nodes, e, outputs), e.helper_sources(), functions, launch)
    return Kernel(template, source, tuple(e.inputs), scalars, tuple(outputs), tuple(entries), frozenset(nodes))
