"""The edit that replaces groups of key-value heads by one head each: weight maps and sizes, no new operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import BlockMap, Cat, Const, Expr, Take
from graphopt.passes.attention.fold import Fold, Groups, of_heads
from graphopt.passes.attention.projections import Heads, Side, Unfit, find_heads
from graphopt.passkit import Edit
from graphopt.views import Attention, Linear, Views, leaves
from graphopt.views.sizes import slice_bounds

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Regroup(Edit):
    """Share one KV head among the members of each group.

    Group g's key is the sum of `keys.into[j] k_j` over its members j, and the queries of head j become
    `keys.back[j]^T q`; values likewise, with the output columns of head j multiplied by `values.back[j]`. Query heads
    are put in the order of the groups, which changes no result.
    """

    view: str
    core: str
    groups: Groups
    heads: int
    keys: Fold
    values: Fold
    init: str

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.view

    def describe(self) -> str:
        """How many KV heads become how many."""
        before = sum(len(group) for group in self.groups)
        return f"{self.view}: {before} KV heads to {len(self.groups)} by {self.init}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "regroup",
            "view": self.view,
            "node": self.core,
            "groups": [list(group) for group in self.groups],
            "query_heads": self.heads,
            "init": self.init,
        }

    @property
    def query_order(self) -> list[int]:
        """Old query heads in their new order."""
        each = self.heads // sum(len(group) for group in self.groups)
        return [j * each + r for group in self.groups for j in group for r in range(each)]

    @property
    def moved(self) -> bool:
        """Whether query heads change places."""
        return self.query_order != list(range(self.heads))

    def _attention(self, views: Views) -> Attention:
        return next(a for a in views.attentions if a.core.name == self.core)

    def check(self, views: Views) -> None:
        """Raise Unfit, with the reason, when the weights cannot say this change."""
        heads = find_heads(views, self._attention(views))
        self._layouts(heads)
        if heads.attention.kv_group is None:
            raise Unfit("its KV heads have no axis of their own")
        maps = self._maps()
        for side, name in ((heads.q, "q"), (heads.o, "o")):
            if side.gated and not maps[name].trivial:
                what = "queries" if name == "q" else "results"
                raise Unfit(f"its {what} are gated, so that they can be neither mixed nor moved; init: mean is legal")
        mask, sinks = heads.attention.core.args[3:5]
        if not self.moved:
            return
        if isinstance(mask, fx.Node) and mask.meta["val"].dim() == 4 and not _is_one(mask.meta["val"].shape[1]):
            raise Unfit("its mask differs from head to head, so that heads cannot change places")
        if isinstance(sinks, fx.Node) and ("weight" not in sinks.meta or len(sinks.users) > 1):
            raise Unfit("its sinks are no weight of their own, so that heads cannot change places")

    def _maps(self) -> dict[str, _Maps]:
        order = self.query_order
        old = torch.tensor(order) // (self.heads // len(self.keys.into))
        single = tuple((i,) for i in order)
        members = torch.tensor(self.groups)
        return {
            "q": _Maps(single, of_heads(self.keys.back.mT, old[:, None])),
            "k": _Maps(self.groups, of_heads(self.keys.into, members)),
            "v": _Maps(self.groups, of_heads(self.values.into, members)),
            "o": _Maps(single, of_heads(self.values.back.mT, old[:, None])),
        }

    def _layouts(self, heads: Heads) -> list[tuple[Linear, _Shared, _Moves | None]]:
        """Products with the sides in each, and how a packing moves: None when each side gets its own product."""
        maps = self._maps()
        found: dict[fx.Node, _Shared] = {}
        for name, side in (("q", heads.q), ("k", heads.k), ("v", heads.v)):
            found.setdefault(side.linear.node, {})[name] = (side, maps[name])
        layouts: list[tuple[Linear, _Shared, _Moves | None]] = []
        for shared in found.values():
            linear = next(iter(shared.values()))[0].linear
            moves = _packed_moves(linear, shared)
            if moves is None:
                _check_separable(linear, shared)
            layouts.append((linear, shared, moves))
        return layouts

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Map the weights and resize what the graph spells out."""
        heads = find_heads(views, self._attention(views))
        for linear, shared, moves in self._layouts(heads):
            if moves is None:
                _separate(rewriter, linear, shared)
            else:
                _repack(rewriter, linear, shared, moves)
        self._resize(rewriter, views, heads)
        self._output(rewriter, heads.o, self._maps()["o"])
        if self.moved:
            self._move_sinks(rewriter, heads.attention.core)

    def _resize(self, rewriter: Rewriter, views: Views, heads: Heads) -> None:
        """Counts of KV heads that views spell out; query-side nodes keep theirs."""
        counted = heads.attention.kv_group
        before, after = len(self.keys.into), len(self.groups)
        queries = set(heads.q.nodes)
        assert counted is not None
        for node in dict.fromkeys((*heads.k.nodes, *heads.v.nodes)):
            schema = getattr(node.target, "_schema", None)
            if node in queries or schema is None:
                continue
            axes = views.labels.of(node) if isinstance(node.meta["val"], Tensor) else []
            today = rewriter.node(node)
            for position, argument in enumerate(schema.arguments[: len(node.args)]):
                sizes = node.args[position]
                if argument.name not in ("size", "shape", "sizes") or not isinstance(sizes, list | tuple):
                    continue
                if argument.name == "sizes":  # Of unflatten: the axes that one axis of the source becomes.
                    first = node.args[1] % node.args[0].meta["val"].dim()  # type: ignore[operator,union-attr]
                    axes = axes[first : first + len(sizes)]
                scaled = [
                    size // before * after if isinstance(size, int) and size > 1 and counted in leaves(axis) else now
                    for size, axis, now in zip(sizes, axes, today.args[position], strict=True)  # type: ignore[arg-type]
                ]
                today.args = (*today.args[:position], scaled, *today.args[position + 1 :])

    def _output(self, rewriter: Rewriter, side: Side, maps: _Maps) -> None:
        linear = side.linear

        def change(expr: Expr) -> Expr:
            mapped = maps(_take(expr, linear.in_axis, side.rows.reshape(-1)), linear.in_axis)
            return _take(mapped, linear.in_axis, torch.argsort(side.rows.reshape(-1)))

        if not maps.trivial:
            rewriter.set_weight(linear.weight, change)

    def _move_sinks(self, rewriter: Rewriter, core: fx.Node) -> None:
        sinks = core.args[4]
        if isinstance(sinks, fx.Node):
            order = tuple(self.query_order)
            rewriter.set_weight(sinks.meta["weight"], lambda expr: Take(expr, 0, order))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Mix keys, queries, values and results next to the attention, on the uncut graph and after the rotation."""
        core = rewriter.node(self._attention(views).core)
        q, k, v = core.args[:3]
        mixed_k = self._mix(rewriter, core, k, self.keys.into, "keys")  # type: ignore[arg-type]
        mixed_v = self._mix(rewriter, core, v, self.values.into, "values")  # type: ignore[arg-type]
        turned_q = self._turn(rewriter, q, self.keys.back, "queries", before=core)  # type: ignore[arg-type]
        core.args = (turned_q, mixed_k, mixed_v, *core.args[3:])
        result = self._turn(rewriter, core, self.values.back.mT, "results", before=core.next)
        rewriter.replace(core, result, keep=lambda user: user is result)

    def _mix(self, rewriter: Rewriter, core: fx.Node, x: fx.Node, into: Tensor, what: str) -> fx.Node:
        """Replace each head of x `[B, K, S, D]` by its group's shared head: map each, then add up those of a group."""
        count = len(into)
        together = torch.zeros(count, count, dtype=torch.float64)
        for group in self.groups:
            together[torch.tensor(group)[:, None], torch.tensor(group)] = 1
        mapped = self._turn(rewriter, x, into.mT, what, before=core)
        weight = rewriter.add_weight(f"regroup.groups.{what}.{self.core}", Const(together, _dtype(x)), "constant")
        last = rewriter.call(aten.transpose.int, mapped, 1, 3, before=core)
        mixed = rewriter.call(aten.matmul.default, last, weight, before=core)
        return rewriter.call(aten.transpose.int, mixed, 1, 3, before=core)

    def _turn(self, rewriter: Rewriter, x: fx.Node, maps: Tensor, what: str, before: fx.Node) -> fx.Node:
        """Multiply each head's row vectors x `[B, H, S, D]` by its KV head's map."""
        heads = int(x.meta["val"].shape[1])
        value = Const(of_heads(maps, torch.arange(heads) // (heads // len(maps))), _dtype(x))
        weight = rewriter.add_weight(f"regroup.{what}.{self.core}", value, "constant")
        return rewriter.call(aten.matmul.default, x, weight, before=before)


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


@dataclass(frozen=True, eq=False)
class _Maps:
    """New heads from old ones: head h is the sum of maps[h, i] x[members[h][i]], maps `[heads, t, D, D]`."""

    members: Groups
    maps: Tensor

    @property
    def identity(self) -> bool:
        """Whether each new head is an old one, unchanged."""
        eye = torch.eye(self.maps.shape[-1], dtype=self.maps.dtype)
        return self.maps.shape[1] == 1 and bool(torch.equal(self.maps, eye.expand_as(self.maps)))

    @property
    def trivial(self) -> bool:
        """Whether nothing changes."""
        return self.identity and self.members == tuple((i,) for i in range(len(self.members)))

    def __call__(self, expr: Expr, axis: int) -> Expr:
        """Map an axis that holds the old heads one after the other."""
        if self.trivial:
            return expr
        if self.identity:
            width = self.maps.shape[-1]
            return Take(expr, axis, tuple(i * width + d for (i,) in self.members for d in range(width)))
        return BlockMap(expr, axis, self.members, self.maps)


_Shared = dict[str, tuple[Side, _Maps]]
_Moves = list[tuple[fx.Node, tuple[Any, ...], Any]]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _take(expr: Expr, axis: int, index: Tensor) -> Expr:
    if torch.equal(index, torch.arange(expr.shape[axis])):
        return expr
    return Take(expr, axis, tuple(index.tolist()))


def _change_weight(rewriter: Rewriter, linear: Linear, change: Callable[[Expr, int], Expr]) -> None:
    rewriter.set_weight(linear.weight, lambda expr: change(expr, linear.out_axis))
    if linear.bias is not None:
        rewriter.set_weight(linear.bias, lambda expr: change(expr, 0))


def _packed_moves(linear: Linear, shared: _Shared) -> _Moves | None:
    """What changes between a product and its sides when these follow one another head by head; None otherwise.

    A side alone is the simplest packing, and nothing has to move for it.
    """
    bounds, moved, total = {0: 0}, 0, 0
    for side, maps in _in_order(shared):
        if not torch.equal(side.rows.reshape(-1), total + torch.arange(side.rows.numel())):
            return None
        total += side.rows.numel()
        moved += len(maps.members) * side.rows.shape[1]
        bounds[total] = moved
    if total != linear.node.meta["val"].shape[-1]:
        return None
    moves: _Moves = []
    if len(shared) == 1:
        return moves
    sides = [side for side, _ in shared.values()]
    common = set.intersection(*({*side.nodes} for side in sides))
    for node in dict.fromkeys(node for side in sides for node in side.nodes if node is not linear.node):
        if node in common or any(source in common for source in node.all_input_nodes):
            found = _rebound(node, bounds, total)
            if found is None:
                return None
            moves.append((node, *found))
    return moves


def _in_order(shared: _Shared) -> list[tuple[Side, _Maps]]:
    return sorted(shared.values(), key=lambda pair: int(pair[0].rows[0, 0]))


def _repack(rewriter: Rewriter, linear: Linear, shared: _Shared, moves: _Moves) -> None:
    for node, arguments, target in moves:
        today = rewriter.node(node)
        today.args = (today.args[0], *fx.node.map_arg(arguments, rewriter.node))
        today.target = target
        today.kwargs = {}
    sides = _in_order(shared)

    def change(expr: Expr, axis: int) -> Expr:
        if len(sides) == 1:
            return sides[0][1](expr, axis)
        return Cat(tuple(maps(_take(expr, axis, side.rows.reshape(-1)), axis) for side, maps in sides), axis)

    if not all(maps.trivial for _, maps in sides):
        _change_weight(rewriter, linear, change)


def _rebound(node: fx.Node, bounds: dict[int, int], total: int) -> tuple[tuple[Any, ...], Any] | None:
    """The arguments and target of a node between a packed projection and its sides once bounds have moved."""
    packet = getattr(node.target, "overloadpacket", node.target)
    source = node.args[0]
    rank = source.meta["val"].dim() if isinstance(source.meta["val"], Tensor) else 0  # type: ignore[union-attr]
    if getattr(node.target, "__name__", "") == "getitem" or packet in (aten.contiguous, aten.clone):
        return tuple(node.args[1:]), node.target
    if packet in (aten.view, aten.reshape, aten._unsafe_view):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if sizes[-1] not in (-1, total):
            return None
        return ([*sizes[:-1], bounds[total] if sizes[-1] == total else -1],), node.target
    if packet in (aten.split, aten.split_with_sizes, aten.chunk):
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        if dim % rank != rank - 1:  # type: ignore[operator]
            return None
        ends = [0]
        for piece in node.meta["val"]:
            ends.append(ends[-1] + int(piece.shape[-1]))
        if any(end not in bounds for end in ends):
            return None
        sizes = [bounds[b] - bounds[a] for a, b in pairwise(ends)]
        return (sizes, dim), aten.split_with_sizes.default
    if packet is aten.slice and node.args[1] % rank == rank - 1:  # type: ignore[operator]
        found = slice_bounds(node, total)
        if found is None or found[0] not in bounds or found[1] not in bounds:
            return None
        return (node.args[1], bounds[found[0]], bounds[found[1]]), node.target
    return None


def _check_separable(linear: Linear, shared: _Shared) -> None:
    if len(shared) == 1:
        raise Unfit(f"{linear.weight} does not hold its heads one after the other")
    if linear.node.target is not aten.linear.default or linear.node.meta["val"].dim() != 3:
        raise Unfit(f"{linear.weight} interleaves queries, keys and values in a product that cannot be taken apart")
    for side, _ in shared.values():
        landing = _landing(side, shared)
        numbers = None if landing is None else side.numbers[landing]
        if not isinstance(numbers, Tensor) or not torch.equal(numbers.reshape(-1), side.rows.reshape(-1)):
            raise Unfit(f"{linear.weight} interleaves queries, keys and values in a way that cannot be taken apart")


def _separate(rewriter: Rewriter, linear: Linear, shared: _Shared) -> None:
    """Give each side of an interleaved projection its own product: query and KV heads no longer pair up."""
    today = rewriter.node(linear.node)
    x = today.args[0]
    stem = linear.weight.removesuffix(".weight")
    weight = rewriter.weights[linear.weight].expr
    bias = rewriter.weights[linear.bias].expr if linear.bias is not None else None
    for name, (side, maps) in shared.items():
        rows = side.rows.reshape(-1)
        arguments = [x, rewriter.add_weight(f"{stem}.{name}.weight", maps(_take(weight, 0, rows), 0))]
        if bias is not None:
            arguments.append(rewriter.add_weight(f"{stem}.{name}.bias", maps(_take(bias, 0, rows), 0)))
        landing = _landing(side, shared)
        assert landing is not None
        made = rewriter.call(aten.linear.default, *arguments, before=today)
        if landing.meta["val"].dim() == 4:
            made = rewriter.call(aten.unflatten.int, made, -1, [len(maps.members), side.rows.shape[1]], before=today)
            if isinstance(landing.meta["val"].shape[1], int):
                made = rewriter.call(aten.transpose.int, made, 1, 2, before=today)
        rewriter.replace(rewriter.node(landing), made)


def _landing(side: Side, shared: _Shared) -> fx.Node | None:
    """The one node at which a side of a packed projection parts from the other sides."""
    common = {node for other, _ in shared.values() if other is not side for node in other.nodes}
    first = [n for n in side.nodes if n not in common and any(source in common for source in n.all_input_nodes)]
    return first[0] if len(first) == 1 else None
