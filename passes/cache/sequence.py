"""How a graph depends on the sequence: which nodes carry tokens, and whether each token passes by itself.

Outside of attention a program that decodes step by step may treat the sequence as a batch and nothing else. Every op
that tokens pass through is checked against what it does along its axes; an op that is not known is refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.leaving import leaving
from graphopt.ir.pictures import splices
from graphopt.ir.program import Input, Program

aten = torch.ops.aten
CORES = (
    torch.ops.graphopt.admitted_attention.default,
    torch.ops.graphopt.attention.default,
    torch.ops.graphopt.bounded_attention.default,
    torch.ops.graphopt.quantised_attention.default,
)
PADDING_CASTS = (aten.to, aten._to_copy, aten.clone, aten.contiguous)

_BY_ROW = {
    aten.__and__, aten.__or__, aten.floor_divide,
    aten.alias, aten.clone, aten.contiguous, aten.copy, aten.detach, aten.dropout, aten.embedding, aten.expand,
    aten.expand_as, aten.flatten, aten.full_like, aten.lift_fresh_copy, aten.masked_fill, aten.movedim, aten.new_zeros,
    aten.new_ones, aten.new_full, aten.numpy_T, aten.one_hot, aten.ones_like, aten.permute,
    aten.repeat, aten.reshape, aten.rsub, aten.squeeze, aten.t, aten.to, aten._to_copy, aten.transpose, aten.type_as,
    aten.unflatten, aten.unsqueeze, aten.view, aten.view_as, aten._unsafe_view, aten.view_as_complex,
    aten.view_as_real, aten.where, aten.zeros_like, aten.rand_like, aten.sym_size, aten.scalar_tensor, aten.full,
    aten.zeros, aten.ones, aten.arange, torch.ops.graphopt.rotary, operator.getitem,
    torch.ops.graphopt.admit_tokens,
}  # fmt: skip
_ALONG_DIM = {
    aten.amax, aten.amin, aten.all, aten.any, aten.argmax, aten.argmin, aten.argsort, aten.cat, aten.chunk, aten.cummax,
    aten.cumprod, aten.cumsum, aten.flip, aten.gather, aten.glu, aten.index_add, aten.index_copy, aten.index_fill,
    aten.index_select, aten.log_softmax, aten._log_softmax, aten.logsumexp, aten.max, aten.mean, aten.median, aten.min,
    aten.norm, aten.linalg_vector_norm, aten.prod, aten.roll, aten.scatter, aten.scatter_add, aten.select,
    aten.select_scatter, aten.slice, aten.slice_scatter, aten.softmax, aten._softmax, aten.sort, aten.split,
    aten.split_with_sizes, aten.std, aten.sum, aten.topk, aten.unbind, aten.var, aten.var_mean, aten.diff,
    aten.repeat_interleave,
}  # fmt: skip
_CHOSEN = {getattr(torch.ops.graphopt, name) for name in ("take_tokens", "put_tokens", "merge_tokens", "merge_windows")}
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution}


class Sequence:
    """The axes and nodes of a program that follow the sequence of its tokens.

    Raises Lost where tokens leave and it cannot be told what chooses them.
    """

    def __init__(self, program: Program, tokens: Input) -> None:
        self.program, self.tokens = program, tokens
        # Padding and positions of another text are values like any other.
        self.roles = {
            spec.name: spec.role if spec.shape[:2] == tokens.shape else "values" for spec in program.entry.inputs
        }
        placeholder = next(n for n in program.graph.graph.nodes if n.meta.get("input") == tokens.name)
        self.placeholder = placeholder
        batch, length = (expression(size) for size in placeholder.meta["val"].shape[:2])
        self.batch, self.length = batch, length
        self.live: set[fx.Node] = set()
        self.placed: set[fx.Node] = set()
        for node in program.graph.graph.nodes:
            self._visit(node)
        self.needed = self._reaching()
        self.leaving = leaving(program)
        self.splices = {splice.node for splice in splices(program)}

    def _reaching(self) -> set[fx.Node]:
        """Nodes whose values, and not their sizes alone, reach a result."""
        found: set[fx.Node] = set()
        stack = list(self.program.output_nodes)
        while stack:
            node = stack.pop()
            if node not in found and packet(node) is not aten.sym_size:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def _visit(self, node: fx.Node) -> None:
        role = self.roles.get(node.meta.get("input", ""))
        if node is self.placeholder:
            self.live.add(node)
            return
        if role in ("padding", "positions"):
            self.placed.add(node)
            return
        if node.op != "call_function" or not is_tensors(node):
            return
        sources = [source for source in node.all_input_nodes if is_tensors(source)]
        if any(source in self.live for source in sources):
            self.live.add(node)
        elif any(source in self.placed for source in sources) or self.axes(node):
            self.placed.add(node)

    def axes(self, node: fx.Node) -> tuple[int, ...]:
        """Axes of a node whose size counts the sequence."""
        value = node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        return tuple(i for i, size in enumerate(value.shape) if self.length in expression(size).free_symbols)

    def role(self, node: fx.Node) -> str | None:
        """What an input means."""
        return self.roles.get(node.meta.get("input", ""))

    def is_padding(self, node: fx.Node) -> bool:
        """Whether a node is the padding input, cast or not."""
        while packet(node) in PADDING_CASTS:
            node = node.args[0]  # type: ignore[assignment]
        return self.role(node) == "padding"

    def mixing(self) -> tuple[fx.Node, str] | None:
        """The first node outside of attention that lets tokens meet, and what it does; None when there is none."""
        carrying = self.live & self.needed
        if self.leaving is not None:
            # Choices are made among the tokens of a prompt, which is there at once.
            carrying &= self.leaving.carrying - set(self.leaving.stages)
        for node in self.program.graph.graph.nodes:
            if node in carrying and node.op == "call_function" and node.target not in CORES:
                reason = self._mixes(node)
                if reason is not None:
                    return node, reason
        for node in self.program.graph.graph.nodes:
            if (
                node.op == "call_function"
                and not is_tensors(node)
                and any(s in self.live for s in node.all_input_nodes)
                and packet(node) not in (aten.sym_size, aten.sym_numel, aten.sym_stride)
            ):
                return node, "it turns a result into a number, on which shapes may depend"
        return None

    def _mixes(self, node: fx.Node) -> str | None:
        kind = packet(node)
        if isinstance(node.meta["val"], torch.Tensor) and len(self.axes(node)) > 1:
            return "it compares tokens with each other"
        sources = [n for n in tensors_in(node) if self.axes(n)]
        if not sources or kind in _BY_ROW or (self.leaving is not None and kind in _CHOSEN):
            return None
        if node in self.splices:
            # A prompt comes whole, with all its pictures.
            return None
        if kind in _ALONG_DIM:
            return self._along(node)
        if kind in (aten.linear, torch.ops.graphopt.rms_norm):
            return self._at(sources[:1], {-1})
        if kind in (aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.baddbmm):
            return self._product(node, kind)
        if kind is aten.layer_norm:
            return self._at(sources[:1], {-1 - i for i in range(len(node.args[1]))})  # type: ignore[arg-type]
        if kind is aten.einsum:
            return self._einsum(node)
        if kind is aten.index:
            taken = {i for i, index in enumerate(node.args[1]) if index is not None}  # type: ignore[arg-type]
            return self._at([node.args[0]], taken)  # type: ignore[list-item]
        if kind in (aten.constant_pad_nd, aten.pad):
            return self._at(sources, {-1 - i for i in range(len(node.args[1]) // 2)})  # type: ignore[arg-type]
        if kind in _CONVOLUTIONS:
            rank = sources[0].meta["val"].dim()
            return self._at(sources[:1], set(range(2, rank)))
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            return None
        return "it is not known to keep tokens apart"

    def _at(self, sources: Iterable[fx.Node], axes: set[int]) -> str | None:
        for source in sources:
            rank = source.meta["val"].dim()
            if {axis % rank for axis in axes} & set(self.axes(source)):
                return "it runs along the sequence"
        return None

    def _along(self, node: fx.Node) -> str | None:
        """Ops that run along the axes that their `dim` names, or along all."""
        schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
        default = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
        dims = given.get("dim", given.get("dims", default.get("dim")))
        sources = [n for n in tensors_in(node) if self.axes(n)]
        rank = max(n.meta["val"].dim() for n in sources)
        if packet(node) is aten.repeat_interleave and packet_overload(node) == "self_int" and dims is not None:
            # Repeating each token's row keeps rows apart; the routes of experts do it.
            return None
        if packet(node) is aten.stack:
            return None
        found = set(range(rank)) if dims in (None, []) else {dims} if isinstance(dims, int) else set(dims)
        return self._at([n for n in sources if n.meta["val"].dim() == rank], found)

    def _product(self, node: fx.Node, kind: Any) -> str | None:
        first = 1 if kind in (aten.addmm, aten.baddbmm) else 0
        a, b = node.args[first : first + 2]
        contracted = [(a, -1), (b, -2 if b.meta["val"].dim() > 1 else -1)]  # type: ignore[union-attr]
        for side, axis in contracted:
            if isinstance(side, fx.Node) and self._at([side], {axis}):
                return "it sums over the sequence"
        return None

    def _einsum(self, node: fx.Node) -> str | None:
        left, _, right = str(node.args[0]).replace(" ", "").partition("->")
        for word, operand in zip(left.split(","), node.args[1], strict=False):  # type: ignore[arg-type]
            for axis in self.axes(operand):  # type: ignore[arg-type]
                if "." in word or word[axis] not in right:
                    return "it sums over the sequence"
        return None


def packet(node: Any) -> Any:
    """The op of a node without its overload."""
    return getattr(node.target, "overloadpacket", node.target) if isinstance(node, fx.Node) else None


def packet_overload(node: fx.Node) -> str:
    """The overload of a node's op."""
    return str(getattr(node.target, "_overloadname", ""))


def is_tensors(node: fx.Node) -> bool:
    """Whether a node is a tensor or several."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value)
    )


def tensors_in(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    if isinstance(size, sympy.Expr):
        return size
    found: sympy.Expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return found
