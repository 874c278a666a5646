"""Finding the tokens that may leave: patches of pictures, pictures in a text, or the text itself. From the graph alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from graphopt.ir.follow import packet, rank
from graphopt.ir.pictures import Splice, splices
from graphopt.ir.program import Input, Program
from graphopt.views import Block, Views
from graphopt.views.trace import derives_from

aten = torch.ops.aten
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution}
_KEEPS_TOKENS = {
    aten.add, aten.mul, aten.layer_norm, aten.dropout, aten.to, aten.contiguous, aten.clone, torch.ops.graphopt.rms_norm,
}  # fmt: skip


class NoSpan(Exception):
    """A program without the tokens that a step is about, and why."""


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens that may leave a stack of layers.

    Of `whole` patches there are `count` behind `front` others in a stream of `total`. Tokens of a text are those of
    `tokens`, and `splice` says which stand for pictures.
    """

    kind: str
    blocks: tuple[Block, ...]
    front: int = 0
    whole: int = 0
    count: int = 0
    total: int = 0
    tokens: Input | None = None
    padding: Input | None = None
    splice: Splice | None = None
    grid: tuple[int, int] = (0, 0)
    first: int = 0
    last: int = 1

    def at(self, layer: int) -> Span:
        """The span as it comes to a layer, when patches have left before."""
        if self.tokens is not None:
            return self
        total = int(self.blocks[layer].entry.meta["val"].shape[1])
        grid = self.grid if total == self.total else (0, 0)
        return replace(self, grid=grid, total=total, count=self.whole - (self.total - total))

    def stay(self, share: tuple[int, int]) -> int:
        """How many patches stay."""
        return min(self.count, self.whole * share[0] // share[1])

    @property
    def ragged(self) -> bool:
        """Whether rows may keep different numbers of tokens."""
        return self.tokens is not None


def find_span(views: Views, kind: str, first: int, last: int) -> Span:
    """The span of a kind; raises NoSpan when the program has none."""
    return _patches(views) if kind == "patches" else _text(views, kind, first, last)


def _text(views: Views, kind: str, first: int, last: int) -> Span:
    program = views.program
    tokens = [spec for spec in program.entry.inputs if spec.role == "tokens"]
    if len(tokens) != 1 or len(tokens[0].shape) != 2:
        raise NoSpan("it does not take one batch of tokens [B, S]")
    padding = next((spec for spec in program.entry.inputs if spec.role == "padding"), None)
    if padding is not None and padding.shape != tokens[0].shape:
        raise NoSpan(f"its padding is {list(padding.shape)}, its tokens {list(tokens[0].shape)}")
    splice = None
    if kind == "image":
        found = splices(program)
        if len(found) != 1:
            many = f"{len(found)} inputs of pictures are written into its tokens, not one"
            raise NoSpan(many if found else "no picture is written into its tokens")
        splice = found[0]
    placeholder = _input(program, tokens[0].name)
    length = _expression(placeholder.meta["val"].shape[1])
    blocks = [
        block
        for block in views.blocks
        if derives_from(block.entry, {tokens[0].name})
        and rank(block.entry) == 3
        and length.free_symbols <= _expression(block.entry.meta["val"].shape[1]).free_symbols
    ]
    if not blocks:
        raise NoSpan("no layer has one entry for each token")
    stack = blocks[-1].stack
    mine = tuple(block for block in blocks if block.stack == stack)
    return Span(kind, mine, tokens=tokens[0], padding=padding, splice=splice, first=first, last=last)


def _patches(views: Views) -> Span:
    program = views.program
    given = {spec.name for spec in program.entry.inputs if spec.role in ("values", "pictures")}
    tokens = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    # A text that pictures are written into is further along on their stack.
    own = [b for b in views.blocks if derives_from(b.entry, given) and not derives_from(b.entry, tokens)]
    for stack in dict.fromkeys(block.stack for block in own):
        blocks = tuple(block for block in own if block.stack == stack)
        entry = blocks[0].entry
        if rank(entry) != 3 or not isinstance(entry.meta["val"].shape[1], int):
            continue
        total = int(entry.meta["val"].shape[1])
        joined = _joined(entry)
        if joined is None:
            if _embeds(entry):
                return Span("patches", blocks, 0, total, total, total, grid=_grid(entry, total))
            continue
        front = 0
        for piece in joined:
            if derives_from(piece, given):
                count = int(piece.meta["val"].shape[1])
                return Span("patches", blocks, front, count, count, total, grid=_grid(entry, count))
            front += int(piece.meta["val"].shape[1])
    raise NoSpan("no stack of layers begins with the patches of a picture")


def _joined(entry: fx.Node) -> list[fx.Node] | None:
    """What was joined along the tokens in front of the first layer; None where nothing was."""
    stack, seen = [entry], {entry}
    while stack:
        node = stack.pop()
        if packet(node) is aten.cat and rank(node) == 3:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if dim in (1, -2):
                return list(node.args[0])  # type: ignore[arg-type]
        if packet(node) in _KEEPS_TOKENS:
            for source in node.all_input_nodes:
                value = source.meta.get("val")
                if source not in seen and isinstance(value, torch.Tensor) and value.shape == entry.meta["val"].shape:
                    seen.add(source)
                    stack.append(source)
    return None


def _embeds(entry: fx.Node) -> bool:
    """Whether a convolution lies in front of the first layer: the embedding of patches."""
    return _convolution(entry) is not None


def _grid(entry: fx.Node, count: int) -> tuple[int, int]:
    """Rows and columns of the patches; (0, 0) where they are not those of one convolution over two axes."""
    node = _convolution(entry)
    shape = () if node is None else tuple(node.meta["val"].shape[2:])
    return (shape[0], shape[1]) if len(shape) == 2 and shape[0] * shape[1] == count else (0, 0)


def _convolution(entry: fx.Node) -> fx.Node | None:
    """The nearest convolution in front of a node."""
    stack, seen = [entry], {entry}
    while stack:
        node = stack.pop()
        if packet(node) in _CONVOLUTIONS:
            return node
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return None


def _input(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.graph.nodes if node.meta.get("input") == name)


def _expression(size: object) -> sympy.Expr:
    found: sympy.Expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return found
