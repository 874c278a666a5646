"""Attention with few queries or over a cache: keys are split over programs, whose results a second kernel joins.

One program takes a tile of rows: all queries of all heads that share one KV head, so that each key is read once
(Flash-Decoding; arXiv:2311.01282). Over a cache, a kernel before it writes the new entries into their slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from graphopt.backends.attention import AttentionEmitter, finish
from graphopt.backends.index import ZERO, Index, same, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, call_text, kernel_text
from graphopt.backends.loops import spread
from graphopt.backends.pointwise import SIGNATURE
from graphopt.ops import attention, cached_attention, packed_attention

SPLITS = 8
M = frozenset("m")
SCRATCH = ("bests", "totals", "sums")


class StepEmitter(AttentionEmitter):
    """Attention of a step of decoding: `held` entries of a row, then the new ones, which see each other by `spans`."""

    scratch: tuple[str, ...] = ()  # what a part keeps beside its maximum, its total and its sums

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        super().__init__(node, inside)
        self.new = Index("(t - held)", frozenset("t"))
        self.is_new = Index(f"(t >= held) & (t < held + {text_of(self.queries)})", frozenset("t"))

    def rows(self) -> tuple[Index, Index]:
        """Rows count the queries of every head of a group."""
        size = text_of(self.queries)
        row = ZERO if same(self.queries, 1) else Index(f"(m % {size})" if self.group > 1 else "m", M)
        if self.heads == 1:
            return row, ZERO
        member = f"m // {size}" if not same(self.queries, 1) else "m"
        return row, Index(
            f"(kv * {self.group} + {member})" if self.group > 1 else "kv", M if self.group > 1 else frozenset()
        )

    def index_of_new(self) -> Index:
        """Which new entry a slot holds."""
        return ZERO if same(self.queries, 1) else self.new

    def sees_new(self) -> str:
        """Whether a query sees a new entry: a walk of the tree is inside of it when it enters the query."""
        spans, one = self.given["spans"], Index("1")
        own = self.read(spans, [self.b, ZERO, self.row])
        entry, left = (self.read(spans, [self.b, side, self.new], guard=self.is_new) for side in (ZERO, one))
        return f"({entry} <= {own}) & ({own} < {left})"

    def opening(self, name: str) -> list[str]:
        """The line that gives an operand's value for the row of the batch, with what it needs."""
        value = self.read(self.given[name], [self.b])
        lines, self.blocks[0].lines = self.blocks[0].lines, []
        return [*lines, f"{name} = {value}"]


class CachedEmitter(StepEmitter):
    """Attention over a cache that grows: the new entries are written behind the committed ones."""

    def __init__(self, node: fx.Node, inside: Sequence[fx.Node] = ()) -> None:
        super().__init__(node, inside)
        self.written_inputs = {self.k, self.v}

    def bounds(self) -> list[str]:
        """Committed slots within the window of the earliest query, and all new ones."""
        lines = [f"held = {self.read(self.given['lengths'], [self.b])}"]
        low = "low = 0"
        if self.window is not None:
            first = self.read(self.given["positions"], [self.b, self.row])
            if self.row is not ZERO:
                first = f"tl.min(tl.where(m_in, {first}, {2**31 - 1}))"
            low = f"low = tl.minimum(held, tl.maximum(0, {first} - {self.window - 1}))"
        lines = [*self.blocks[0].lines, *lines]
        self.blocks[0].lines = []
        return [*lines, low, f"high = held + {text_of(self.queries)}"]

    def visible(self, say: Callable[[str], None]) -> list[str]:
        """Committed entries are seen, new ones by their ancestors, both within the window."""
        conditions = ["t_in"]
        if not same(self.queries, 1):
            conditions.append(f"((t < held) | ({self.sees_new()}))")
        if self.window is not None or self.mask is not None:
            places = self.read(self.given["positions"], [self.b, self.index_of_new()], guard=self.is_new)
            say(f"place = tl.where(t < held, t, {places})")
        if self.window is not None:
            own = self.read(self.given["positions"], [self.b, self.row])
            conditions.append(f"(place > {own} - {self.window})")
        return conditions

    def mask_column(self) -> Index:
        """A mask speaks of key positions."""
        return Index("place", frozenset("t"))


def build_split(node: fx.Node, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernels of attention with one query, or over a cache; what stands behind it is computed where parts are joined."""
    e = _emitter(node, nodes)
    bounds = e.bounds()
    before, loop, after = e.body()
    write = _write(e) if isinstance(e, CachedEmitter) else []
    signature = Signature(e, outputs)
    stores = e.stores(outputs, signature.out_names)
    rows = str(e.group) if same(e.queries, 1) else f"({e.group} * {text_of(e.queries)})"
    # With more keys at a time the masks of a cache take registers that the sums need.
    tile = {"SPLITS": SPLITS, **e.tile(), "TBLOCK": 32}
    head = [f"b = tl.program_id(0) // {e.kv_heads}", f"kv = tl.program_id(0) % {e.kv_heads}",
            "m = tl.program_id(1) * MBLOCK + tl.arange(0, MBLOCK)[:, None]", f"m_in = m < {rows}"]  # fmt: skip
    place = f"(tl.program_id(0) * {rows} + m) * SPLITS"
    part = ["split = tl.program_id(2)", "span = tl.cdiv(tl.cdiv(high - low, SPLITS), TBLOCK) * TBLOCK",
            "low = low + split * span", "high = tl.minimum(high, low + span)"]  # fmt: skip
    body = [*head, *e.feature_lines(), *bounds, *part, *before, *e.walk(loop), f"part = {place} + split",
            "tl.store(bests + part, best, mask=m_in)", "tl.store(totals + part, total, mask=m_in)",
            f"tl.store(sums + part * {e.width} + e, acc, mask=m_in & e_in)", *e.kept("part")]  # fmt: skip
    scratch = (*SCRATCH, *(e.scratch if isinstance(e, StepEmitter) else ()))
    names = [*signature.names, *scratch]
    blocks = ["MBLOCK", *tile, "DOT"]
    kernel = kernel_text("kernel", [*names, *(f"{n}: tl.constexpr" for n in blocks)], body)
    joined = _joined(e, place, after, stores)
    joins = ["MBLOCK", "SPLITS", "EBLOCK", *(["DBLOCK"] if len(scratch) > len(SCRATCH) else [])]
    join = kernel_text(
        "join", [*names, *(f"{n}: tl.constexpr" for n in joins)],
        [*head, "e = tl.arange(0, EBLOCK)[None, :]", f"e_in = e < {e.width}", *joined],
    )  # fmt: skip
    grid = f"{text_of(e.batch)} * {e.kv_heads}, triton.cdiv({rows}, MBLOCK)"
    device = next(iter(e.inputs.values()))
    passed = ", ".join(names)
    call = [
        f"MBLOCK = max(16, min(64, triton.next_power_of_2({rows})))",
        f"shape = ({text_of(e.batch)}, {e.kv_heads}, {rows}, SPLITS)",
        f"bests = torch.empty(shape, dtype=torch.float32, device={device}.device)",
        "totals = torch.empty_like(bests)",
        f"sums = torch.empty((*shape, {e.width}), dtype=torch.float32, device={device}.device)",
    ]
    if len(scratch) > len(SCRATCH):
        call += ["numbers = torch.empty_like(bests)", "gone_values = torch.empty_like(sums)",
                 f"gone_keys = torch.empty((*shape, {e.features}), dtype=torch.float32, device={device}.device)"]  # fmt: skip
    entries = []
    types = (*signature.types(), *((n, "*fp32") for n in scratch))
    sizes = {"MBLOCK": 16, **tile}
    dot = SIGNATURE[e.q.meta["val"].dtype]
    functions = [kernel, join]
    if write:
        text = kernel_text(
            "write", [*signature.names, *(f"{n}: tl.constexpr" for n in ("SBLOCK", "DBLOCK", "EBLOCK"))], write
        )
        functions.insert(0, text)
        call += ["SBLOCK = 16"]
        start = f"write[({text_of(e.batch)} * {e.kv_heads}, triton.cdiv({text_of(e.queries)}, SBLOCK))]"
        call += call_text(start, ", ".join([*signature.names, "SBLOCK=SBLOCK", "DBLOCK=DBLOCK", "EBLOCK=EBLOCK"]))
        entries.append(
            Entry("write", signature.types(), (("SBLOCK", 16), *((n, tile[n]) for n in ("DBLOCK", "EBLOCK"))))
        )
    call += call_text(
        f"kernel[({grid}, SPLITS)]", f"{passed}, {', '.join(f'{n}={n}' for n in blocks)}, num_warps=num_warps"
    )
    call += call_text(f"join[({grid})]", f"{passed}, {', '.join(f'{n}={n}' for n in joins)}")
    entries.append(Entry("kernel", types, (*sizes.items(), ("DOT", dot))))
    entries.append(Entry("join", types, tuple((n, sizes[n]) for n in joins)))
    return finish(e, signature, functions, call, tile, entries, template_of(node), nodes, outputs)


def _emitter(node: fx.Node, nodes: Sequence[fx.Node]) -> AttentionEmitter:
    if node.target is attention:
        return AttentionEmitter(node, nodes)
    if node.target is cached_attention:
        return CachedEmitter(node, nodes)
    if node.target is packed_attention:
        from graphopt.backends.packed_cache import PackedEmitter

        return PackedEmitter(node, nodes)
    from graphopt.backends.held import HeldEmitter

    return HeldEmitter(node, nodes)


def template_of(node: fx.Node) -> str:
    """What names the kernels of a step's attention."""
    return "decode_attention" if node.target is attention else node.target._schema.name.partition("::")[2]  # type: ignore[union-attr]


def _joined(e: AttentionEmitter, place: str, after: list[str], stores: list[str]) -> list[str]:
    """One row's parts, weighed by what each saw; sinks take their mass here, once."""
    return [
        "splits = tl.arange(0, SPLITS)[None, :]",
        f"part = {place}",
        'part_best = tl.load(bests + part + splits, mask=m_in, other=-float("inf"))',
        "best = tl.max(part_best, 1)[:, None]",
        'base = tl.where(best == -float("inf"), 0.0, best)',
        "part_total = tl.load(totals + part + splits, mask=m_in, other=0.0)",
        "total = tl.sum(part_total * tl.exp(part_best - base), 1)[:, None]",
        "acc = tl.zeros([MBLOCK, EBLOCK], tl.float32)",
        "for split in range(SPLITS):",
        '    share = tl.exp(tl.load(bests + part + split, mask=m_in, other=-float("inf")) - base)',
        f"    acc += share * tl.load(sums + (part + split) * {e.width} + e, mask=m_in & e_in, other=0.0)",
        *e.joined(),
        *after,
        "result = acc / tl.where(total == 0.0, 1.0, total)",
        *stores,
    ]


def _write(e: CachedEmitter) -> list[str]:
    """Put the new entries of one KV head into their slots."""
    size = text_of(e.queries)
    e.masks["s"] = "s_in"
    s = ZERO if same(e.queries, 1) else Index("s", frozenset("s"))
    slot = Index("(held + s)", frozenset("s"))
    lines = [f"b = tl.program_id(0) // {e.kv_heads}", f"kv = tl.program_id(0) % {e.kv_heads}",
             "s = tl.program_id(1) * SBLOCK + tl.arange(0, SBLOCK)[:, None]", f"s_in = s < {size}",
             "d = tl.arange(0, DBLOCK)[None, :]", f"d_in = d < {e.features}",
             "e = tl.arange(0, EBLOCK)[None, :]", f"e_in = e < {e.width}"]  # fmt: skip
    e.blocks[0].memo.clear()
    held = e.read(e.given["lengths"], [e.b])
    lines += [*e.blocks[0].lines, f"held = {held}"]
    e.blocks[0].lines = []
    for source, buffer, axis, width in ((e.given["k"], e.k, "d", e.features), (e.given["v"], e.v, "e", e.width)):
        feature = e.index(axis, width)
        new = e.read(source, [e.b, e.kv, s, feature])
        lines += e.blocks[0].lines
        e.blocks[0].lines = []
        offset = e.offset(buffer, e.inputs[buffer], [e.b, e.kv, slot, feature])
        lines.append(f"tl.store({e.inputs[buffer]} + {spread(offset, 's')}, {new}, mask=s_in & {axis}_in)")
    return lines
