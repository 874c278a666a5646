"""Matrix products with what comes before and after them, generated from a group of nodes.

Any number of products of one shape share a kernel (gate and up of a gated MLP); what makes their operands (a norm,
dequantisation) is written into the loads, what reads them (bias, activation, gate, residual) into the stores. One row is
a matrix-vector product without tensor cores; several rows use `tl.dot`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.backends.emit import VIEWS, Value, packet
from graphopt.backends.index import ZERO, Index, Size, Unfusable, linear, reshape, same, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, assemble, call_text, describe, kernel_text
from graphopt.backends.loops import LoopEmitter, spread
from graphopt.backends.pointwise import SIGNATURE, TRITON

aten = torch.ops.aten

N = frozenset("n")
COLUMN = frozenset({"r_down"})
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GEMV_TILE = {"NBLOCK": 8, "RBLOCK": 512}
GEMM_TILE = {"XBLOCK": 16, "NBLOCK": 64, "RBLOCK": 64}


def is_product(node: fx.Node) -> bool:
    """Whether the generator writes a node as a matrix product: mm, or addmm without factors."""
    kind = packet(node)
    if kind not in (aten.mm, aten.addmm) or node.kwargs or node.target._overloadname in ("out", "dtype"):  # type: ignore[union-attr]
        return False
    return all(n.meta["val"].dtype in FLOATS for n in (node, *node.all_input_nodes))


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a product."""
    left, right = node.args[-2:]
    return left, right  # type: ignore[return-value]


class ProductEmitter(LoopEmitter):
    """Rows `x` and the summed axis `r` as in reductions; `n` runs over the columns of the result."""

    loop_of = {"r_down": "r"}

    def __init__(self, inside: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        self.products = [node for node in inside if self.owns(node)]
        super().__init__(inside, outputs, looped=True)
        self.masks |= {"n": "n_in", "r_down": "r_down_in"}
        rows, self.width, depth = self.shape(self.products[0])
        self.single = same(self.rows, 1)
        self.few = self.single  # whether a program computes one row, without tensor cores
        x = ZERO if self.single else Index("x", frozenset("x"))
        n = ZERO if same(self.width, 1) else Index("n", N)
        self.result = [x, n]
        for node in self.products:
            if not all(same(a, b) for a, b in zip(self.shape(node), (rows, self.width, depth), strict=True)):
                raise Unfusable("products of different shapes")

    def owns(self, node: fx.Node) -> bool:
        """Whether a node is a product that this template computes."""
        return is_product(node)

    def shape(self, node: fx.Node) -> tuple[Size, Size, Size]:
        """Rows, columns and the summed size of a product."""
        rows, depth = self.sizes(operands(node)[0])
        return rows, self.sizes(node)[1], depth

    def known_at(self, node: fx.Node) -> list[Index]:
        """The coordinates at which a product's sums are known."""
        return self.result

    def factors(self, node: fx.Node, r: Index, down: Index) -> tuple[fx.Node, Value, Value]:
        """The first factor, and the values of both along the summed axis."""
        left, right = operands(node)
        return left, self.value(left, [self.result[0], r]), self.value(right, [down, self.result[1]])

    def space(self, inside: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[list[Size], list[int]]:
        """Rows of the first factor; its columns are summed."""
        rows, _, depth = self.shape(self.products[0])
        return [rows, depth], [1]

    def write(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """Sums of products are known by name; a bias is added to them."""
        if node in self.products:
            if [i.text for i in indices] != [i.text for i in self.known_at(node)]:
                raise Unfusable("a product that is read at other coordinates than it is stored")
            held = f"acc{self.products.index(node)}"
            axes = frozenset(a for i in indices for a in i.axes)
            if packet(node) is aten.addmm:
                bias = self.operand(node, node.args[0], indices, guard)
                held = self.line(f"{held} + {bias.read(node.meta['val'].dtype)}", "biased", axes)
            return Value(held, node.meta["val"].dtype, axes)
        return super().write(node, indices, guard)

    def multiply(self) -> list[str]:
        """The loop over the summed axis; its sums are called acc0, acc1 and so on."""
        r = Index("r", frozenset("r")) if not same(self.columns, 1) else ZERO
        down = r if self.few or r is ZERO else Index("r_down", COLUMN)
        shape = "[NBLOCK, RBLOCK]" if self.few else "[XBLOCK, NBLOCK]"
        start = [f"acc{i} = tl.zeros({shape}, tl.float32)" for i in range(len(self.products))]
        with self.loop("r") as body:
            for number, node in enumerate(self.products):
                left, a, b = self.factors(node, r, down)
                # What is computed from masked loads need not be zero beyond the end of the axis.
                first = (
                    a.text
                    if self.loaded(left)
                    else self.line(f"tl.where(r_in, {a.text}, 0.0)", "bounded", a.axes | {"r"})
                )
                if self.few:
                    body.lines.append(f"acc{number} += {first} * {b.text}")
                    continue
                spread = [] if "x" in a.axes else [f"{first} = tl.broadcast_to({first}, [XBLOCK, RBLOCK])"]
                spread += [] if b.axes >= N else [f"{b.text} = tl.broadcast_to({b.text}, [RBLOCK, NBLOCK])"]
                exact = ', input_precision="ieee"' if left.meta["val"].dtype == torch.float32 else ""
                body.lines += [*spread, f"acc{number} = tl.dot({first}.to(DOT), {b.text}.to(DOT), acc{number}{exact})"]
        lines = self.walk(body.lines)
        if not self.few:
            down_lines = [
                "    r_down = r_start + tl.arange(0, RBLOCK)[:, None]",
                f"    r_down_in = r_down < {text_of(self.columns)}",
            ]
            lines[3:3] = down_lines
        ends = [f"acc{i} = tl.sum(acc{i}, 1)[:, None]" for i in range(len(self.products))] if self.few else []
        return [*start, *lines, *ends]

    def loaded(self, node: fx.Node) -> bool:
        """Whether an operand is read from memory as it is, views aside."""
        while node not in self.inside and packet(node) in VIEWS:
            node = node.args[0]  # type: ignore[assignment]
        return node not in self.inside


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of a group with products; raises Unfusable when it cannot be one."""
    e = ProductEmitter(nodes, outputs)
    signature = Signature(e, outputs)
    return _kernel(e, signature, nodes, outputs, body(e, signature, outputs))


def body(e: ProductEmitter, signature: Signature, outputs: Sequence[fx.Node]) -> list[str]:
    """What a program computes of its tile."""
    places = []
    for node, name in zip(outputs, signature.out_names, strict=True):
        sizes = e.sizes(node)
        places.append((node, name, reshape(e.result, [e.rows, e.width], sizes)))
    # What is known before the loop is written first, the loop itself next, then what reads its sums.
    product_lines = e.multiply()
    prologue, e.blocks[0].lines = e.blocks[0].lines, []
    for node, name, indices in places:
        value = e.value(node, indices)
        if "r" in value.axes or "r_down" in value.axes:
            raise Unfusable("a result that varies along the summed axis")
        offset = linear(indices, e.sizes(node)) if node.meta["val"].is_contiguous() else e.offset(node, name, indices)
        masks = " & ".join(e.masks[a] for a in sorted({"n", *([] if e.few else ["x"])}))
        where = spread(offset, "n")
        e.blocks[0].lines.append(f"tl.store({name} + {where}, {value.read(node.meta['val'].dtype)}, mask={masks})")
    stores = e.blocks[0].lines
    return [*prologue, *product_lines, *stores]


def _kernel(
    e: ProductEmitter, signature: Signature, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], main: list[str]
) -> Kernel:
    rows, width = text_of(e.rows), text_of(e.width)
    if e.single:
        head = ["n = tl.program_id(0) * NBLOCK + tl.arange(0, NBLOCK)[:, None]", f"n_in = n < {width}"]
        grid, tile = f"(triton.cdiv({width}, NBLOCK),)", GEMV_TILE
    else:
        head = ["x = tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None]", f"x_in = x < {rows}",
                "n = tl.program_id(1) * NBLOCK + tl.arange(0, NBLOCK)[None, :]", f"n_in = n < {width}"]  # fmt: skip
        grid, tile = f"(triton.cdiv({rows}, XBLOCK), triton.cdiv({width}, NBLOCK))", GEMM_TILE
    constants = ["XBLOCK", *(name for name in tile if name != "XBLOCK"), *([] if e.single else ["DOT"])]
    text = kernel_text(
        "kernel",
        [*signature.names, *(f"{name}: tl.constexpr" for name in constants)],
        [*head, *e._used("x", main), *main],
    )
    dot = TRITON[operands(e.products[0])[0].meta["val"].dtype]
    defaults = ", ".join(f"{name}={value}" for name, value in tile.items())
    defaults = f"*, {defaults}, {'' if e.single else f'DOT={dot}, '}num_warps=4"
    passed = [f"{name}={name if name in tile or name == 'DOT' else 1}" for name in constants]
    call = ", ".join([*signature.names, *passed, "num_warps=num_warps"])
    launch, scalars = signature.launch(
        [f"if {rows} > 0:", *(f"    {line}" for line in call_text(f"kernel[{grid}]", call))], defaults
    )
    source = assemble(describe(nodes, e, outputs), e.helper_sources(), [text], launch)
    kind = SIGNATURE[operands(e.products[0])[0].meta["val"].dtype]
    values = [(name, kind if name == "DOT" else tile.get(name, 1)) for name in constants]
    entry = Entry("kernel", signature.types(), tuple(values), 4)
    return Kernel("gemv" if e.single else "gemm", source, tuple(e.inputs), scalars, tuple(outputs), (entry,),
                  frozenset(nodes))  # fmt: skip
