"""Products of tokens with the matrices of their experts, generated from gathers of a bank of matrices and batched products.

The gather of matrices happens in the loads, and so does that of tokens. With few pairs of token and expert a program
computes a part of one pair's row; with many, pairs are sorted by expert and a program multiplies a tile of pairs that
share one (grouped GEMM). What comes before and after is written as for other products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.backends.emit import RESHAPES, VIEWS, Value, packet
from graphopt.backends.index import ZERO, Index, Size, Unfusable, same, text_of
from graphopt.backends.kernel import Entry, Kernel, Signature, assemble, call_text, describe, kernel_text
from graphopt.backends.pointwise import SIGNATURE, TRITON
from graphopt.backends.products import FLOATS, GEMV_TILE, ProductEmitter, body

aten = torch.ops.aten

FEW_PAIRS = 16
GROUPED_TILE = {"XBLOCK": 32, "NBLOCK": 64, "RBLOCK": 64}
ARRANGE = '''def arrange(experts, count, block):
    """Pairs by expert, each expert's share filled up to whole blocks with -1, and the expert of every block (-1: none)."""
    experts = experts.reshape(-1)
    order = torch.argsort(experts, stable=True)
    own = torch.zeros(count, dtype=torch.int64, device=experts.device)
    own.scatter_add_(0, experts.to(torch.int64), torch.ones_like(experts, dtype=torch.int64))
    blocks = (own + block - 1) // block
    ends = torch.cumsum(blocks, 0)
    most = min(experts.numel(), experts.numel() // block + count)
    which = experts[order].to(torch.int64)
    rank = torch.arange(experts.numel(), device=experts.device) - (torch.cumsum(own, 0) - own)[which]
    rows = torch.full((most * block,), -1, dtype=torch.int64, device=experts.device)
    rows.scatter_(0, (ends - blocks)[which] * block + rank, order)
    at = torch.arange(most, device=experts.device)
    tiles = torch.searchsorted(ends, at, right=True)
    return rows, torch.where(at < ends[-1], tiles, -1)
'''


def is_gather(node: fx.Node) -> bool:
    """Whether a node takes whole matrices or rows of a bank by a list of numbers."""
    if packet(node) is aten.index:
        chosen = node.args[1]
    elif packet(node) is aten.index_select and node.args[1] == 0:
        chosen = [node.args[2]]
    else:
        return False
    if len(chosen) != 1 or not isinstance(chosen[0], fx.Node):  # type: ignore[arg-type]
        return False
    value = chosen[0].meta["val"]  # type: ignore[index]
    return value.dim() == 1 and value.dtype in (torch.int32, torch.int64)


def numbers(node: fx.Node) -> fx.Node:
    """What a gather takes."""
    found = node.args[1][0] if packet(node) is aten.index else node.args[2]  # type: ignore[index]
    return found  # type: ignore[return-value]


def bank(node: fx.Node) -> fx.Node | None:
    """The gather that a factor reads through views, or None."""
    while packet(node) in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node if is_gather(node) and node.meta["val"].dim() == 3 else None


def matrices(node: fx.Node) -> tuple[int, fx.Node] | None:
    """Which factor of a batched product of single rows is gathered, and the gather; None for any other node."""
    if packet(node) is not aten.bmm or node.kwargs or len(node.args) != 2:
        return None
    if any(n.meta["val"].dtype not in FLOATS for n in (node, *node.all_input_nodes)):
        return None
    shape = node.meta["val"].shape
    for side, single in ((0, shape[2]), (1, shape[1])):
        found = bank(node.args[side])  # type: ignore[arg-type]
        if found is not None and isinstance(single, int) and single == 1:
            return side, found
    return None


def is_expert_product(node: fx.Node) -> bool:
    """Whether the generator writes a node as products of tokens with their experts' matrices."""
    return matrices(node) is not None


def is_expert_gather(node: fx.Node) -> bool:
    """Whether a gather takes what an expert product needs: its matrices, or what else goes by the same numbers."""
    if not is_gather(node):
        return False
    stack = [user for gather in numbers(node).users if is_gather(gather) for user in gather.users]
    while stack:
        user = stack.pop()
        if is_expert_product(user):
            return True
        stack += user.users if packet(user) in VIEWS else ()
    return False


class ExpertEmitter(ProductEmitter):
    """Rows `x` are pairs of a token and an expert; `expert` is one number for a program's whole tile."""

    def __init__(self, inside: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        super().__init__(inside, outputs)
        self.gathers = [node for node in inside if is_gather(node)]
        own = {found[1] for node in self.products if (found := matrices(node)) is not None}
        if not own <= set(self.gathers):
            raise Unfusable("matrices of experts that are gathered first")
        chosen = {numbers(node) for node in self.gathers}
        if len(chosen) > 1:
            raise Unfusable("experts by several lists")
        self.chosen = chosen.pop()
        self.single, self.few = False, isinstance(self.rows, int) and self.rows <= FEW_PAIRS
        self.result[0] = ZERO if same(self.rows, 1) else Index("x", frozenset() if self.few else frozenset("x"))
        if self.few:
            self.expert = Index(self.value(self.chosen, [self.result[0]]).text)
        else:
            self.expert = Index("expert")

    def owns(self, node: fx.Node) -> bool:
        """Products with gathered matrices."""
        return is_expert_product(node)

    def shape(self, node: fx.Node) -> tuple[Size, Size, Size]:
        """Pairs, columns of the result and the summed size."""
        side, _ = matrices(node)  # type: ignore[misc]
        batch, rows, depth = self.sizes(node.args[0])  # type: ignore[arg-type]
        return batch, rows if side == 0 else self.sizes(node)[2], depth

    def known_at(self, node: fx.Node) -> list[Index]:
        """A batched product has an axis of one row."""
        x, n = self.result
        return [x, n, ZERO] if matrices(node)[0] == 0 else [x, ZERO, n]  # type: ignore[index]

    def factors(self, node: fx.Node, r: Index, down: Index) -> tuple[fx.Node, Value, Value]:
        """A token's row and its expert's matrix."""
        left, right = node.args
        x, n = self.result
        if matrices(node)[0] == 0:  # type: ignore[index]
            return right, self.value(right, [x, r, ZERO]), self.value(left, [x, n, down])  # type: ignore[return-value]
        return left, self.value(left, [x, ZERO, r]), self.value(right, [x, down, n])  # type: ignore[return-value]

    def write(self, node: fx.Node, indices: list[Index], guard: Index | None) -> Value:
        """A gather reads the bank at the program's expert."""
        if node in self.gathers:
            if indices[0].text != self.result[0].text:
                raise Unfusable("an expert of another pair")
            return self.value(node.args[0], [self.expert, *indices[1:]], guard)
        return super().write(node, indices, guard)

    def pointer(self) -> str:
        """The argument that holds the experts' numbers, all in a row."""
        node = self.chosen
        while node not in self.inputs:
            if packet(node) not in RESHAPES:
                raise Unfusable("experts by a list that is computed")
            node = node.args[0]  # type: ignore[assignment]
        return self.inputs[node]


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of a group with products of experts; raises Unfusable when it cannot be one."""
    e = ExpertEmitter(nodes, outputs)
    if not e.few:
        e.value(e.chosen, [Index("0")])
        e.blocks[0].lines, e.blocks[0].memo = [], {}
    signature = Signature(e, outputs)
    lines = body(e, signature, outputs)
    rows, width = text_of(e.rows), text_of(e.width)
    experts = text_of(e.sizes(e.gathers[0].args[0])[0])  # type: ignore[arg-type]
    if e.few:
        tile = dict(GEMV_TILE)
        head = ["x = tl.program_id(1)", "n = tl.program_id(0) * NBLOCK + tl.arange(0, NBLOCK)[:, None]"]
        extras: tuple[tuple[str, str], ...] = ()
        start, grid = [], f"(triton.cdiv({width}, NBLOCK), {rows})"
    else:
        tile = dict(GROUPED_TILE)
        extras = (("pairs", "*i64"), ("tiles", "*i64"))
        head = ["expert = tl.load(tiles + tl.program_id(0))", "if expert < 0:", "    return",
                "x = tl.load(pairs + tl.program_id(0) * XBLOCK + tl.arange(0, XBLOCK)[:, None])", "x_in = x >= 0",
                "n = tl.program_id(1) * NBLOCK + tl.arange(0, NBLOCK)[None, :]"]  # fmt: skip
        start = [f"pairs, tiles = arrange({e.pointer()}, {experts}, XBLOCK)"]
        grid = f"(tiles.numel(), triton.cdiv({width}, NBLOCK))"
    kind = matrices(e.products[0])[1].meta["val"].dtype  # type: ignore[index]
    names = [*tile, *([] if e.few else ["DOT"])]
    arguments = [*signature.names, *(name for name, _ in extras)]
    text = kernel_text(
        "kernel",
        [*arguments, *(f"{name}: tl.constexpr" for name in names)],
        [*head, f"n_in = n < {width}", *e._used("x", lines), *lines],
    )
    passed = ", ".join([*arguments, *(f"{name}={name}" for name in names), "num_warps=num_warps"])
    defaults = ", ".join([*(f"{k}={v}" for k, v in tile.items()), *([] if e.few else [f"DOT={TRITON[kind]}"])])
    call = [f"if {rows} > 0:", *(f"    {line}" for line in [*start, *call_text(f"kernel[{grid}]", passed)])]
    launch, scalars = signature.launch(call, f"*, {defaults}, num_warps=4")
    functions = [text] if e.few else [text, ARRANGE]
    source = assemble(describe(nodes, e, outputs), e.helper_sources(), functions, launch)
    values = (*tile.items(), *([] if e.few else [("DOT", SIGNATURE[kind])]))
    entry = Entry("kernel", (*signature.types(), *extras), values, 4)
    template = "expert_gemv" if e.few else "expert_gemm"
    return Kernel(template, source, tuple(e.inputs), scalars, tuple(outputs), (entry,), frozenset(nodes))
