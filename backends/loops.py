"""Pointwise and reduction kernels, generated from a group of nodes.

The iteration space is rows `x` times, when the group reduces, columns `r`. Short rows are held whole in registers; long
ones are walked in blocks, one walk for every reduction that needs a former one and one for the results.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.backends.emit import Emitter, Value, packet
from graphopt.backends.index import ZERO, Index, Size, Unfusable, bare, product, reshape, same, split, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, assemble, call_text, describe, kernel_text
from graphopt.backends.pointwise import TRITON, cast

aten = torch.ops.aten

REDUCTIONS = (aten.sum, aten.mean, aten.amax, aten.amin, aten.any, aten.all)
ROW_LIMIT = 8192  # elements of a row that are held in registers
X, R = frozenset("x"), frozenset("r")


def is_reduction(node: fx.Node) -> bool:
    """Whether the generator writes this node as a reduction over given axes."""
    kind = packet(node)
    if kind not in REDUCTIONS or node.target._overloadname in ("out", "correction", "IntList_out"):  # type: ignore[union-attr]
        return False
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if source.dim() == 0 or source.dtype not in TRITON or result.dtype not in TRITON:
        return False
    return not (kind in (aten.amax, aten.amin) and source.dtype == torch.bool)


def reduced_axes(node: fx.Node) -> list[int]:
    """The axes that a reduction removes."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(given, int):
        given = [given]
    axes = sorted(int(a) % rank for a in given) if given else list(range(rank))  # type: ignore[union-attr, arg-type]
    return axes


class LoopEmitter(Emitter):
    """Values of pointwise and reduction nodes over rows and columns."""

    def __init__(self, inside: Sequence[fx.Node], outputs: Sequence[fx.Node], looped: bool) -> None:
        super().__init__(inside, {"x": "x_in", "r": "r_in"})
        self.looped = looped
        self.written: Counter[fx.Node] = Counter()
        self.swap: tuple[int, int] | None = None
        self.full, self.axes = self.space(inside, outputs)
        self.kept_sizes = [s for a, s in enumerate(self.full) if a not in self.axes]
        self.red_sizes = [self.full[a] for a in self.axes]
        self.rows, self.columns = product(self.kept_sizes), product(self.red_sizes)
        self.definitions: dict[str, str] = {}
        self.kept = self._pieces(Index("x", X), self.kept_sizes)
        self.red = self._pieces(Index("r", R), self.red_sizes)

    def space(self, inside: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[list[Size], list[int]]:
        """The shape that is iterated over and its reduced axes."""
        for node in inside:
            if is_reduction(node):
                return self.sizes(node.args[0]), reduced_axes(node)  # type: ignore[arg-type]
        # Any output will do: all must have as many elements.
        return self.sizes(max(outputs, key=lambda n: n.meta["val"].dim())), []

    def _pieces(self, whole: Index, sizes: list[Size]) -> list[Index]:
        """Named coordinates of a position."""
        named = []
        for number, piece in enumerate(split(whole, sizes)):
            if piece.origin is not None:
                name = f"{whole.text}{number}"
                self.definitions[name] = bare(piece.text)
                piece = Index(name, piece.axes, piece.parts, piece.origin)
            named.append(piece)
        return named

    def place(self, node: fx.Node) -> tuple[list[Index], bool]:
        """The coordinates of an output in the iteration space, and whether it has one element a row."""
        sizes = self.sizes(node)
        if self.axes and same(product(sizes), self.rows) and not same(self.columns, 1):
            return reshape(self.kept, self.kept_sizes, sizes), True
        whole, full = self.whole(), list(self.full)
        if self.swap is not None:
            a, b = self.swap
            whole[a], whole[b], full[a], full[b] = whole[b], whole[a], full[b], full[a]
        return reshape(whole, full, sizes), False

    def whole(self) -> list[Index]:
        """Coordinates in the space's own shape."""
        kept, red = iter(self.kept), iter(self.red)
        return [next(red) if a in self.axes else next(kept) for a in range(len(self.full))]

    def write(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """Reductions here, the rest by the base class."""
        self.written[node] += 0 if self.looped else 1
        if node not in self.inside or not is_reduction(node):
            return super().write(node, indices, guard)
        source = node.args[0]
        axes, sizes = reduced_axes(node), self.sizes(source)  # type: ignore[arg-type]
        own_kept = [s for a, s in enumerate(sizes) if a not in axes]
        own_red = [sizes[a] for a in axes]
        expected = reshape(self.kept, self.kept_sizes, own_kept)
        keeps = len(indices) == len(sizes)
        asked = [i for a, i in enumerate(indices) if a not in axes] if keeps else indices
        if [i.text for i in asked] != [i.text for i in expected] or not same(product(own_red), self.columns):
            raise Unfusable("a reduction over other rows")
        kept, red = iter(expected), iter(reshape(self.red, self.red_sizes, own_red))
        inner = [next(red) if a in axes else next(kept) for a in range(len(sizes))]
        return self._reduce(node, source, inner)  # type: ignore[arg-type]

    def _reduce(self, node: fx.Node, source: fx.Node, inner: list[Index]) -> Value:
        kind, dtype = packet(node), node.meta["val"].dtype
        kind_name = str(kind.__name__)
        inside = torch.bool if kind in (aten.any, aten.all) else source.meta["val"].dtype
        if kind in (aten.sum, aten.mean):
            inside = dtype
        working = torch.float32 if inside in (torch.float16, torch.bfloat16) else inside
        if working == torch.bool:
            working = torch.int32
        identity = {aten.amax: _lowest(working), aten.amin: _highest(working), aten.all: "1"}.get(kind, "0")
        if not self.looped:
            value = self.value(source, inner)
            text = self._bounded(value, inside, working, identity)
            name = self._finish(kind, text, kind_name, working)
        else:
            with self.loop("r") as body:
                value = self.value(source, inner)
                text = self._bounded(value, inside, working, identity)
            total = self.name("total")
            update = {aten.amax: f"tl.maximum({total}, {text}, propagate_nan=tl.PropagateNan.ALL)",
                      aten.amin: f"tl.minimum({total}, {text}, propagate_nan=tl.PropagateNan.ALL)",
                      aten.any: f"{total} | {text}", aten.all: f"{total} & {text}"}.get(kind, f"{total} + {text}")  # fmt: skip
            lines = self.blocks[0].lines
            lines.append(f"{total} = tl.full([XBLOCK, RBLOCK], {identity}, {TRITON[working]})")
            lines += self.walk([*body.lines, f"{total} = {update}"])
            name = self._finish(kind, total, kind_name, working)
        if kind is aten.mean:
            name = self.line(f"{name} / {_float(self.columns)}", "mean", X)
            return Value(name, dtype, X)
        if kind in (aten.any, aten.all):
            name = self.line(f"{name} != 0", kind_name, X)
        result = torch.bool if kind in (aten.any, aten.all) else working
        text = cast(name, result, dtype)
        return Value(text, dtype, X)

    def _bounded(self, value: Value, inside: torch.dtype, working: torch.dtype, identity: str) -> str:
        text = value.read(inside)
        if inside == torch.bool:
            text = f"{text}.to(tl.int32)" if value.number is None else text
        if value.number is not None or "r" not in value.axes or "x" not in value.axes:
            text = f"tl.full([XBLOCK, RBLOCK], 0, {TRITON[working]}) + {text}"
        return f"tl.where(r_in, {text}, {identity})"

    def _finish(self, kind: Any, text: str, stem: str, working: torch.dtype) -> str:
        reducer = {aten.amax: "max", aten.all: "min", aten.amin: "min", aten.any: "max"}.get(kind, "sum")
        if kind in (aten.amax, aten.amin) and working.is_floating_point:
            # tl.max and tl.min pass over NaN, torch does not.
            held = self.line(text, "held", X | R) if not self.looped else text
            odd = self.line(f"tl.max(({held} != {held}).to(tl.int32), 1)[:, None]", "has_nan", X)
            return self.line(f'tl.where({odd} > 0, float("nan"), tl.{reducer}({held}, 1)[:, None])', stem, X)
        return self.line(f"tl.{reducer}({text}, 1)[:, None]", "total" if kind is aten.mean else stem, X)

    def walk(self, body: Sequence[str]) -> list[str]:
        """A loop over the blocks of a row."""
        columns = text_of(self.columns)
        head = [
            f"for r_start in range(0, {columns}, RBLOCK):",
            "    r = r_start + tl.arange(0, RBLOCK)[None, :]",
            f"    r_in = r < {columns}",
        ]
        return head + [f"    {line}" for line in [*self._used("r", body), *body]]

    def _used(self, prefix: str, body: Sequence[str]) -> list[str]:
        """Definitions of the named coordinates that some line reads."""
        text = "\n".join(body)
        return [
            f"{name} = {what}"
            for name, what in self.definitions.items()
            if name.startswith(prefix) and re.search(rf"\b{name}\b", text)
        ]


def _float(size: Size) -> str:
    return f"{size}.0" if isinstance(size, int) else text_of(size)


def _lowest(dtype: torch.dtype) -> str:
    return '-float("inf")' if dtype.is_floating_point else str(torch.iinfo(dtype).min)


def _highest(dtype: torch.dtype) -> str:
    return 'float("inf")' if dtype.is_floating_point else str(torch.iinfo(dtype).max)


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of a group of pointwise and reduction nodes, in graph order; raises Unfusable when it cannot be one.

    Results may lie in another order of axes than the rows that are reduced (heads before positions, say).
    """
    looped = _is_long(nodes)
    try:
        return _build(nodes, outputs, looped, None)
    except Unfusable as reason:
        for swap in _swaps(nodes, outputs):
            try:
                return _build(nodes, outputs, looped, swap)
            except Unfusable:
                continue
        raise reason


def _swaps(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Pairs of neighbouring axes that a reducing group's results may have in the other order."""
    sources = [node.args[0].meta["val"].dim() for node in nodes if is_reduction(node)]  # type: ignore[union-attr]
    ranks = {node.meta["val"].dim() for node in outputs}
    if not sources or ranks != {sources[0]}:
        return []
    return [(axis, axis + 1) for axis in range(sources[0] - 1)]


def _build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], looped: bool, swap: tuple[int, int] | None) -> Kernel:
    e = LoopEmitter(nodes, outputs, looped)
    e.swap = swap
    signature = Signature(e, outputs)
    rows: list[tuple[fx.Node, str, list[Index]]] = []
    full: list[tuple[fx.Node, str, list[Index]]] = []
    for node, name in zip(outputs, signature.out_names, strict=True):
        indices, is_row = e.place(node)
        (rows if is_row else full).append((node, name, indices))
    for node, name, indices in rows:
        value = e.value(node, indices)
        if "r" in value.axes:
            raise Unfusable("one element a row that differs along the row")
        e.blocks[0].lines.append(_store(e, node, name, indices, value))
    lines = e.blocks[0].lines
    if full and looped:
        with e.loop("r") as body:
            for node, name, indices in full:
                body.lines.append(_store(e, node, name, indices, e.value(node, indices)))
        lines += e.walk(body.lines)
    else:
        for node, name, indices in full:
            lines.append(_store(e, node, name, indices, e.value(node, indices)))
    for node in outputs:
        if e.written[node] > 1:
            raise Unfusable("a stored value that is computed again at other coordinates")
    return _kernel(e, signature, nodes, outputs)


def _is_long(nodes: Sequence[fx.Node]) -> bool:
    for node in nodes:
        if is_reduction(node):
            sizes = node.args[0].meta["val"].shape  # type: ignore[union-attr]
            columns: Any = 1
            for axis in reduced_axes(node):
                columns = columns * sizes[axis]
            return not isinstance(columns, int) or columns > ROW_LIMIT
    return False


def _store(e: LoopEmitter, node: fx.Node, name: str, indices: Sequence[Index], value: Value) -> str:
    dtype = node.meta["val"].dtype
    offset = e.offset(node, name, indices)
    mask = " & ".join(e.masks[a] for a in sorted({"x"} | offset.axes))
    text = value.read(dtype)
    where = spread(offset, "x")
    return f"tl.store({name} + {where}, {text}, mask={mask})"


def spread(offset: Index, axis: str) -> str:
    """The text of an offset that has the tile's shape even where only one element lies along `axis`."""
    text = bare(offset.text)
    return text if axis in offset.axes else f"{axis} * 0" if text == "0" else f"{axis} * 0 + {text}"


def _kernel(e: LoopEmitter, signature: Signature, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    reduces = bool(e.axes)
    rows = text_of(e.rows)
    body = ["x = tl.program_id(0).to(INDEX) * XBLOCK + tl.arange(0, XBLOCK)" + ("[:, None]" if reduces else "")]
    body.append(f"x_in = x < {rows}")
    main = e.blocks[0].lines
    if reduces and not e.looped:
        body += ["r = tl.arange(0, RBLOCK)[None, :]", f"r_in = r < {text_of(e.columns)}"]
        body += e._used("r", main)
    body += e._used("x", main) + main
    constants = "XBLOCK: tl.constexpr, " + ("RBLOCK: tl.constexpr, " if reduces else "") + "INDEX: tl.constexpr"
    function = kernel_text("kernel", [*signature.names, constants], body)
    index = f"INDEX = tl.int64 if {text_of(_largest(e, outputs))} >= 2**31 else tl.int32"
    call = ", ".join(
        [
            *signature.names,
            "XBLOCK=XBLOCK",
            *(["RBLOCK=RBLOCK"] if reduces else []),
            "INDEX=INDEX",
            "num_warps=num_warps",
        ]
    )
    start = [index]
    columns = text_of(e.columns)
    if reduces:
        start.append(f"RBLOCK = min(RBLOCK, triton.next_power_of_2({columns}))" if e.looped
                     else f"RBLOCK = triton.next_power_of_2({columns})")  # fmt: skip
        start.append("XBLOCK = XBLOCK or max(1, min(64, 2048 // RBLOCK))")
        start.append("num_warps = num_warps or max(1, min(16, XBLOCK * RBLOCK // 256))")
    start.append(f"if {rows} > 0:")
    start += [f"    {line}" for line in call_text(f"kernel[(triton.cdiv({rows}, XBLOCK),)]", call)]
    defaults = "*, XBLOCK=1024, num_warps=4"
    if reduces:
        defaults = "*, XBLOCK=None, " + ("RBLOCK=2048, " if e.looped else "") + "num_warps=None"
    launch, scalars = signature.launch(start, defaults)
    source = assemble(describe(nodes, e, outputs), e.helper_sources(), [function], launch)
    tile: list[tuple[str, Any]] = [("XBLOCK", 1024)]
    if reduces:
        width = e.columns if isinstance(e.columns, int) and not e.looped else 2048
        width = max(2, 1 << (max(width, 1) - 1).bit_length())
        tile = [("XBLOCK", max(1, min(64, 2048 // width))), ("RBLOCK", width)]
    warps = 4 if not reduces else max(1, min(16, tile[0][1] * tile[1][1] // 256))
    entry = Entry("kernel", signature.types(), (*tile, ("INDEX", "int32")), warps)
    return Kernel(
        "reduction" if reduces else "pointwise", source, tuple(e.inputs), scalars, tuple(outputs), (entry,),
        frozenset(nodes),
    )  # fmt: skip


def _largest(e: LoopEmitter, outputs: Sequence[fx.Node]) -> Size:
    """The largest number of elements that any coordinate runs to: that of the whole space."""
    return product(e.full)


__all__ = ["ROW_LIMIT", "ZERO", "build", "is_reduction", "reduced_axes"]
