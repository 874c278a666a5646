"""Following one axis (tokens, pictures) through a graph: where it lies in every result, and who meets it there.

Rules are by op, from shapes alone. An axis may be merged with others by a view and parted again: what identifies it is
how many entries lie inside of it, so that sizes that happen to be equal are never mistaken for each other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)

aten = torch.ops.aten
ops = torch.ops.graphopt


class Lost(Exception):
    """An op through which the axis cannot be followed: `node` and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"%{node.name} ({node.target}) {reason}")
        self.node, self.reason = node, reason


@dataclass(frozen=True)
class At:
    """Where the axis is: position `axis`, with so many entries of merged axes outside (`outer`) and inside (`inner`)."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def whole(self) -> bool:
        """Whether the axis is merged with no other."""
        return self.outer == self.inner == 1


@dataclass
class Step:
    """What one node does with the axis.

    `at` is where it lies in the result (None: it is gone). `meets` are operands outside of what is followed that have
    entries for it, with the position. `event` names what ends it or runs along it: `reduce`, `select`, `slice`, `size`,
    `splice`, `attention`. `sizes` rewrites the arguments of a view for another length.
    """

    at: At | None
    meets: list[tuple[fx.Node, int]] = field(default_factory=list)
    event: str | None = None
    sizes: Callable[[Any], tuple[Any, ...]] | None = None


def packet(node: fx.Node) -> Any:
    """The op of a node without its overload."""
    return getattr(node.target, "overloadpacket", node.target)


def follow(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    """What `node` does with the axis that lies at `known[operand]` in its operands; raises Lost where that is not known."""
    kind = packet(node)
    rule = _RULES.get(kind)
    if rule is not None:
        return rule(node, known)
    if kind in _SAME or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags):
        return _pointwise(node, known)
    raise Lost(node, "has no rule")


_PRIMES: dict[str, int] = {}


def sizes_of(value: Any) -> list[int]:
    """The sizes of a fake tensor as integers, a large prime for each symbol, so that products tell what they are of."""
    found = []
    for size in value.shape:
        expr = sympy.Integer(size) if isinstance(size, int) else size.node.expr
        number = expr.subs({symbol: _prime(str(symbol)) for symbol in expr.free_symbols})
        if not number.is_Integer:
            raise ValueError(f"a size of {expr}")
        found.append(int(number))
    return found


def _prime(name: str) -> int:
    """The same prime for the same symbol, another one for every other."""
    if name not in _PRIMES:
        _PRIMES[name] = int(sympy.nextprime(max(_PRIMES.values(), default=1_000_000)))
    return _PRIMES[name]


def _product(values: list[int]) -> int:
    total = 1
    for value in values:
        total *= value
    return total


def rank(node: Any) -> int:
    """How many axes a node's tensor has."""
    return int(node.meta["val"].dim())


def tensors(node: fx.Node) -> Iterator[fx.Node]:
    """The operands of a node that are tensors."""
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), torch.Tensor):
            yield source


def given(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the op's schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for position, argument in enumerate(schema):
        if argument.name == name:
            if position < len(node.args):
                return node.args[position]
            if name in node.kwargs:
                return node.kwargs[name]
            return argument.default_value if argument.has_default_value() else default
    return default


def _aligned(node: fx.Node, known: Mapping[fx.Node, At | None], operands: list[fx.Node], out: int) -> Step:
    """Operands broadcast against each other from the right."""
    found: set[At] = set()
    for operand in operands:
        at = known.get(operand)
        if at is not None:
            found.add(At(at.axis + out - rank(operand), at.outer, at.inner))
    if len(found) != 1:
        raise Lost(node, "meets the axis at several places")
    at = found.pop()
    meets = []
    for operand in operands:
        position = at.axis - (out - rank(operand))
        if known.get(operand) is None and position >= 0 and operand.meta["val"].shape[position] != 1:
            if not at.whole:
                raise Lost(node, "joins a merged axis with another tensor")
            meets.append((operand, position))
    return Step(at, meets)


def _pointwise(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    return _aligned(node, known, list(tensors(node)), rank(node))


def _first(node: fx.Node, known: Mapping[fx.Node, At | None]) -> At:
    at = known.get(node.args[0])  # type: ignore[arg-type]
    if at is None:
        raise Lost(node, "reads the axis in another operand than the first")
    return at


def _rows(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    """Ops that run over the last axis of their first operand."""
    at = _first(node, known)
    if at.axis == rank(node.args[0]) - 1:
        raise Lost(node, "runs along the axis")
    return Step(at)


def _addmm(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = known.get(node.args[1])  # type: ignore[arg-type]
    if at is None or at.axis != 0:
        raise Lost(node, "runs along the axis")
    return Step(at)


def _norm(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    if at.axis >= rank(node.args[0]) - len(node.args[1]):  # type: ignore[arg-type]
        raise Lost(node, "runs along the axis")
    return Step(at)


def _matmul(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    x, y = node.args[:2]
    out, at_x, at_y = rank(node), known.get(x), known.get(y)  # type: ignore[arg-type]
    if rank(x) < 2 or rank(y) < 2:
        raise Lost(node, "multiplies by a vector")
    placed = []
    for operand, at, contracted in ((x, at_x, rank(x) - 1), (y, at_y, rank(y) - 2)):
        if at is not None:
            if at.axis == contracted:
                raise Lost(node, "sums over the axis")
            placed.append(At(at.axis + out - rank(operand), at.outer, at.inner))
    if len(set(placed)) != 1:
        raise Lost(node, "compares entries of the axis with each other")
    at = placed[0]
    if at.axis < out - 2:
        return _aligned(node, known, [x, y], out)  # type: ignore[list-item]
    return Step(at)


def _cat(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    pieces: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = given(node, "dim", 0) % rank(pieces[0])
    step = _aligned(node, known, pieces, rank(pieces[0]))
    assert step.at is not None
    if step.at.axis == dim:
        raise Lost(node, "joins something to the axis")
    return step


def _along(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    """Ops that move entries along another axis, by indices of the same rank."""
    dim = given(node, "dim", -1)
    operands = list(tensors(node))
    step = _aligned(node, known, operands, rank(operands[0]))
    assert step.at is not None
    if step.at.axis == dim % rank(operands[0]):
        raise Lost(node, "runs along the axis")
    return step


def _einsum(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    left, _, right = equation.partition("->")
    words = left.split(",")
    places = {
        (words[i][at.axis], at.whole)
        for i, operand in enumerate(operands)
        if "." not in words[i] and (at := known.get(operand)) is not None
    }
    if "." in equation or len(places) != 1 or not (place := next(iter(places)))[1] or place[0] not in right:
        raise Lost(node, "sums over the axis")
    letter = place[0]
    others = [word for word, operand in zip(words, operands, strict=True) if known.get(operand) is None]
    if any(letter in word for word in others):
        raise Lost(node, "joins the axis with another tensor")
    return Step(At(right.index(letter)))


def _repeated(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    """Each entry so many times in a row."""
    at, count = _first(node, known), node.args[1]
    if not isinstance(count, int) or len(node.args) < 3:
        raise Lost(node, "repeats entries a computed number of times")
    if node.args[2] % rank(node) != at.axis:  # type: ignore[operator]
        return Step(at)
    return Step(At(at.axis, at.outer, at.inner * count))


def _picked(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    """Rows of a table, one for each entry: the index alone follows the axis."""
    table, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    at = known.get(indices[0]) if len(indices) == 1 else None
    if at is None or known.get(table) is not None:  # type: ignore[arg-type]
        raise Lost(node, "picks entries of the axis")
    return Step(at)


def _stack(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    pieces: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = given(node, "dim", 0) % rank(node)
    step = _aligned(node, known, pieces, rank(pieces[0]))
    assert step.at is not None
    return Step(_moved(step.at, step.at.axis + (dim <= step.at.axis)), step.meets)


def _split(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    if given(node, "dim", 0) % rank(node.args[0]) == at.axis:
        raise Lost(node, "splits the axis")
    return Step(at)


def _unbind(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    dim = given(node, "dim", 0) % rank(node.args[0])
    if dim == at.axis:
        raise Lost(node, "takes the axis apart")
    return Step(_moved(at, at.axis - (dim < at.axis)))


def _slice(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    same = node.meta["val"].shape[at.axis] == node.args[0].meta["val"].shape[at.axis]  # type: ignore[union-attr]
    if given(node, "dim", 0) % rank(node) == at.axis and not same:
        return Step(None, event="slice")
    return Step(at)


def _select(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    dim = given(node, "dim", 0) % rank(node.args[0])
    if dim == at.axis:
        if not at.whole:
            raise Lost(node, "takes one entry of a merged axis")
        return Step(None, event="select")
    return Step(_moved(at, at.axis - (dim < at.axis)))


def _reduce(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    dims = given(node, "dim")
    count = rank(node.args[0])
    over = set(range(count)) if dims is None or dims == [] else {d % count for d in _listed(dims)}
    if at.axis in over:
        return Step(None, event="reduce")
    return Step(at if given(node, "keepdim", False) else _moved(at, at.axis - sum(d < at.axis for d in over)))


def _softmax(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    if given(node, "dim") % rank(node) == at.axis:
        raise Lost(node, "runs along the axis")
    return Step(at)


def _transpose(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at, count = _first(node, known), rank(node)
    a, b = (0, 1) if packet(node) is aten.t else (d % count for d in node.args[1:3])  # type: ignore[operator]
    return Step(_moved(at, {a: b, b: a}.get(at.axis, at.axis)))


def _permute(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    order = [d % rank(node) for d in node.args[1]]  # type: ignore[union-attr,operator]
    return Step(_moved(at, order.index(at.axis)))


def _unsqueeze(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    return Step(_moved(at, at.axis + (given(node, "dim") % rank(node) <= at.axis)))


def _squeeze(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    dims = given(node, "dim")
    chosen = range(source.dim()) if dims is None else [d % source.dim() for d in _listed(dims)]
    gone = {d for d in chosen if source.shape[d] == 1}
    if at.axis in gone:
        raise Lost(node, "drops the axis")
    return Step(_moved(at, at.axis - sum(d < at.axis for d in gone)))


def _expand(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    position = at.axis + rank(node) - rank(node.args[0])

    def sizes(length: Any) -> tuple[Any, ...]:
        wanted = list(node.args[1])  # type: ignore[arg-type]
        wanted[position] = -1
        return (node.args[0], wanted, *node.args[2:])

    return Step(_moved(at, position), sizes=sizes)


def _view(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    source, result = sizes_of(node.args[0].meta["val"]), sizes_of(node.meta["val"])  # type: ignore[union-attr]
    size = source[at.axis] // (at.outer * at.inner)
    stride = at.inner * _product(source[at.axis + 1 :])
    for axis, wanted in enumerate(result):
        behind = _product(result[axis + 1 :])
        if wanted % size or stride % behind or (wanted * behind) % (stride * size):
            continue
        if size == 1 and wanted != 1:
            continue
        found = At(axis, wanted * behind // (stride * size), stride // behind)
        return Step(found, sizes=partial(_resized, node, found))
    raise Lost(node, "regroups the axis")


def _resized(node: fx.Node, at: At, length: Any) -> tuple[Any, ...]:
    """The arguments of a view for another length of the axis."""
    if packet(node) is aten.flatten:
        return tuple(node.args)
    wanted = list(node.args[1])  # type: ignore[arg-type]
    if at.whole:
        wanted[at.axis] = length
        return (node.args[0], wanted, *node.args[2:])
    for axis, size in enumerate(wanted):
        if size == -1 and axis != at.axis:
            known = node.meta["val"].shape[axis]
            if not isinstance(known, int):
                raise Lost(node, "merges the axis where another size is not known")
            wanted[axis] = known
    wanted[at.axis] = -1
    return (node.args[0], wanted, *node.args[2:])


def _attention(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    q, k, v, mask = node.args[:4]
    places = {known.get(side) for side in (q, k, v)} - {None}  # type: ignore[arg-type]
    if len(places) != 1 or not (at := next(iter(places))).whole:  # type: ignore[union-attr]
        raise Lost(node, "reads the axis at several places")
    if at.axis == 2:  # type: ignore[union-attr]
        return Step(at if known.get(q) is not None else None, event="attention")  # type: ignore[arg-type]
    if at.axis != 0:  # type: ignore[union-attr]
        raise Lost(node, "runs along the axis")
    meets = [
        (s, 0)
        for s in (q, k, v, mask)
        if isinstance(s, fx.Node) and known.get(s) is None and s.meta["val"].shape[0] != 1
    ]
    return Step(at, meets)


def _convolution(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    if at.axis != 0 or not at.whole:
        raise Lost(node, "runs along the axis")
    return Step(at)


def _embedding(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = known.get(node.args[1])  # type: ignore[arg-type]
    if at is None:
        raise Lost(node, "looks entries up")
    return Step(at)


def _splice(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    if known.get(node.args[2]) is None or any(known.get(side) is not None for side in node.args[:2]):  # type: ignore[arg-type]
        raise Lost(node, "writes into the axis")
    return Step(None, event="splice")


def _size(node: fx.Node, known: Mapping[fx.Node, At | None]) -> Step:
    at = _first(node, known)
    return Step(None, event="size" if node.args[1] % rank(node.args[0]) == at.axis else None)  # type: ignore[operator]


def _moved(at: At, axis: int) -> At:
    return At(axis, at.outer, at.inner)


def _listed(dims: Any) -> list[int]:
    return list(dims) if isinstance(dims, list | tuple) else [dims]


_SAME = {
    aten.to, aten._to_copy, aten.contiguous, aten.clone, aten.alias, aten.detach, aten.dropout, aten.type_as,
    aten.zeros_like, aten.ones_like, aten.full_like, aten.rsub, aten.where, aten.masked_fill, aten.__and__,
    aten.__or__, aten.expand_as, ops.rotary,
}  # fmt: skip
_RULES: dict[Any, Callable[[fx.Node, Mapping[fx.Node, At | None]], Step]] = {
    aten.linear: _rows,
    ops.rms_norm: _rows,
    aten.glu: _rows,
    aten.addmm: _addmm,
    aten.layer_norm: _norm,
    aten.matmul: _matmul,
    aten.bmm: _matmul,
    aten.cat: _cat,
    aten.einsum: _einsum,
    aten.gather: _along,
    aten.index: _picked,
    aten.repeat_interleave: _repeated,
    aten.scatter: _along,
    aten.sort: _along,
    aten.topk: _along,
    aten.stack: _stack,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _split,
    aten.unbind: _unbind,
    operator.getitem: lambda node, known: Step(_first(node, known)),
    aten.slice: _slice,
    aten.select: _select,
    aten.mean: _reduce,
    aten.sum: _reduce,
    aten.amax: _reduce,
    aten.amin: _reduce,
    aten.var: _reduce,
    aten.softmax: _softmax,
    aten._softmax: _softmax,
    aten.log_softmax: _softmax,
    aten.transpose: _transpose,
    aten.t: _transpose,
    aten.permute: _permute,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.expand: _expand,
    aten.view: _view,
    aten.reshape: _view,
    aten._unsafe_view: _view,
    aten.flatten: _view,
    ops.attention: _attention,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.convolution: _convolution,
    aten.embedding: _embedding,
    aten.masked_scatter: _splice,
    aten.sym_size: _size,
}
