"""The edit that makes a bank of experts out of a dense feed-forward."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Affine, Cat, Const, Expr, Rearrange, Take
from graphopt.passes.experts.dense import Dense, Half, read_dense
from graphopt.passes.experts.route import Route
from graphopt.passkit import Edit
from graphopt.views import Linear, Views

aten = torch.ops.aten
Call = Callable[..., fx.Node]
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Refactor(Edit):
    """Let expert e compute the neurons `groups[e]`, a router say which experts a token goes to, and all use `shared`.

    Experts are as wide as the widest group, the others end in neurons of zero weight. What the down projection adds is
    added once. Where the router's weights sum to 1, down projections are multiplied by the number of experts that a
    token goes to, so that experts that count alike count as they did.
    """

    view: str
    down: str
    groups: Groups
    neurons: int
    route: Route
    partition: str
    router: Mapping[str, torch.Tensor] = field(repr=False)
    shared: tuple[int, ...] = ()
    gated: bool = False
    """whether tokens gate what all share; at first by 1"""

    @property
    def candidate(self) -> str:
        """The feed-forward."""
        return self.view

    @property
    def width(self) -> int:
        """Neurons of an expert."""
        return max(len(group) for group in self.groups)

    def describe(self) -> str:
        """How many experts, how wide, and how many a token goes to."""
        return (
            f"{self.view}: {self.neurons} neurons to {len(self.groups)} experts of {self.width} by {self.partition},"
            f" {self.route.describe()}" + (f", {len(self.shared)} shared by all" if self.shared else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "refactor",
            "view": self.view,
            "node": self.down,
            "experts": len(self.groups),
            "width": self.width,
            "groups": [list(group) for group in self.groups],
            "partition": self.partition,
            "shared": list(self.shared),
            "gated": self.gated,
            "route": self.route.to_json(),
        }

    def _dense(self, views: Views) -> Dense:
        return read_dense(views, next(f for f in views.feed_forwards if f.down.node.name == self.down))

    def _caller(self, rewriter: Rewriter, down: fx.Node, part: str) -> Call:
        """Inserts before the down projection of today, under the path of a part of the new block."""

        def call(target: Any, *args: Any) -> fx.Node:
            made = rewriter.call(target, *args, before=down)
            made.meta["path"] = f"{self.view}.{part}"
            return made

        return call

    def _choice(self, rewriter: Rewriter, dense: Dense, down: fx.Node) -> _Choice:
        """The routing before the down projection, or the one that the layers share."""
        call = self._caller(rewriter, down, "router")
        source = rewriter.node(dense.x)
        flat = dense.x.meta["val"].dim() == 2
        x = source if flat else call(aten.reshape.default, source, [-1, dense.x.meta["val"].shape[-1]])
        if not self.route.by_token:
            weight, bias = self._router(rewriter, self.view)
            scores = self.route.scores(rewriter, call, source if self.route.by_sequence else x, weight, bias)
            return _Choice(source, x, *self.route.choose(rewriter, call, scores))
        if "refactor.choice" not in rewriter.shared:
            first = next(node for node in rewriter.graph.nodes if node.op == "call_function")
            early = self._caller(rewriter, first, "")
            tokens = next(spec.name for spec in rewriter.program.entry.inputs if spec.role == "tokens")
            weight, _ = self._router(rewriter, "")
            scores = self.route.scores(rewriter, early, rewriter.input_node(tokens), weight, None)
            rewriter.shared["refactor.choice"] = self.route.choose(rewriter, early, scores)
        return _Choice(source, x, *rewriter.shared["refactor.choice"])

    def _router(self, rewriter: Rewriter, path: str) -> tuple[fx.Node, fx.Node | None]:
        """The router's matrix and its bias, or its table."""
        dtype, kind = rewriter.program.dtype, "parameter" if self.route.weighted else "buffer"
        stem = f"{path}.router" if path else "router"
        found = [
            rewriter.add_weight(_free(rewriter, f"{stem}.{name}"), Const(value.to(dtype), dtype), kind)
            for name, value in self.router.items()
        ]
        return found[0], found[1] if len(found) > 1 else None

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Stack the weights of the groups and run what each token's experts compute, and what all tokens share."""
        dense = self._dense(views)
        down = rewriter.node(dense.view.down.node)
        source, x, index, counts = self._choice(rewriter, dense, down)
        call, count = self._caller(rewriter, down, "experts"), self.route.count
        rows = call(aten.repeat_interleave.self_int, x, count, 0)
        hidden = dense.replay(rewriter, call, self._first(rewriter, call, dense, rows, index))
        bank = rewriter.add_weight(_free(rewriter, f"{self.view}.experts.down"), self._down(rewriter, dense))
        result = _product(call, bank, index, hidden)
        if counts is not None:
            result = call(aten.mul.Tensor, result, call(aten.unsqueeze.default, counts, -1))
        out = int(dense.view.down.node.meta["val"].shape[-1])
        result = call(aten.sum.dim_IntList, call(aten.reshape.default, result, [-1, count, out]), [1])
        if counts is not None and self.route.wide != self.route.dtype and not self.route.rounded:
            result = call(aten.to.dtype, result, self.route.dtype)
        if self.shared:
            result = call(aten.add.Tensor, result, self._for_all(rewriter, dense, down, x))
        bias = dense.view.down.bias
        if bias is not None:
            result = call(aten.add.Tensor, result, rewriter.weight_node(bias))
        if dense.view.down.node.meta["val"].dim() == 3:
            sizes = [call(aten.sym_size.int, source, axis) for axis in (0, 1)]
            result = call(aten.reshape.default, result, [*sizes, out])
        rewriter.replace(down, result)

    def _for_all(self, rewriter: Rewriter, dense: Dense, down: fx.Node, x: fx.Node) -> fx.Node:
        """What the neurons that all tokens go through make of `[N, d]`."""
        call, stem = self._caller(rewriter, down, "shared"), f"{self.view}.shared"

        def part(linear: Linear, axis: int, rows: tuple[int, ...], name: str) -> fx.Node:
            taken = Take(rewriter.weights[linear.weight].expr, axis, rows)
            matrix = taken if linear.in_axis == 1 else Rearrange(taken, taken.shape, (1, 0))
            return rewriter.add_weight(_free(rewriter, f"{stem}.{name}.weight"), matrix)

        values = []
        for name, half in zip(("gate", "up")[-len(dense.halves) :], dense.halves, strict=True):
            rows = tuple(half.rows[neuron] for neuron in self.shared)
            arguments = [x, part(half.linear, half.linear.out_axis, rows, name)]
            if half.linear.bias is not None:
                bias = Take(rewriter.weights[half.linear.bias].expr, 0, rows)
                arguments.append(rewriter.add_weight(_free(rewriter, f"{stem}.{name}.bias"), bias))
            values.append(call(aten.linear.default, *arguments))
        hidden = dense.replay(rewriter, call, tuple(values))
        down_linear = dense.view.down
        matrix = part(down_linear, down_linear.in_axis, self.shared, "down")
        if not self.gated:
            return call(aten.linear.default, hidden, matrix)
        # The gate of zeros is a half, and twice a number is exact.
        rewriter.set_weight(matrix.meta["weight"], lambda expr: Affine(expr, 2.0))
        width, dtype = int(dense.x.meta["val"].shape[-1]), rewriter.program.dtype
        gate = Const(torch.zeros(1, width, dtype=dtype), dtype)
        score = call(aten.linear.default, x, rewriter.add_weight(_free(rewriter, f"{stem}_gate.weight"), gate))
        return call(aten.mul.Tensor, call(aten.sigmoid.default, score), call(aten.linear.default, hidden, matrix))

    def _first(
        self, rewriter: Rewriter, call: Call, dense: Dense, rows: fx.Node, index: fx.Node
    ) -> tuple[fx.Node, ...]:
        """What the experts' first matrices make of the rows `[N, d]`: the gate, when there is one, and up `[N, n]`."""
        pieces = [self._rows(rewriter, half) for half in dense.halves]
        bank = Cat(tuple(pieces), 1) if len(pieces) > 1 else pieces[0]
        name = _free(rewriter, f"{self.view}.experts.{'gate_up' if len(pieces) > 1 else 'up'}")
        made = _product(call, rewriter.add_weight(name, bank), index, rows)
        biases = [self._bias(rewriter, half) for half in dense.halves]
        if any(bias is not None for bias in biases):
            dtype = pieces[0].dtype
            empty = Const(torch.zeros(len(self.groups), self.width, dtype=dtype), dtype)
            table = tuple(empty if bias is None else bias for bias in biases)
            joined = Cat(table, 1) if len(table) > 1 else table[0]
            added = rewriter.add_weight(f"{name}_bias", joined)
            made = call(aten.add.Tensor, made, call(aten.index.Tensor, added, [index]))
        if len(pieces) == 1:
            return (made,)
        halves = call(aten.chunk.default, made, 2, -1)
        return tuple(call(operator.getitem, halves, i) for i in (0, 1))

    def _taken(self, expr: Expr, axis: int, rows: tuple[int, ...]) -> Expr:
        """The rows of all groups one after the other, each group filled up with zeros."""
        short = any(len(group) < self.width for group in self.groups)
        whole = expr.shape[axis]
        if short:
            sizes = [1 if i == axis else size for i, size in enumerate(expr.shape)]
            expr = Cat((expr, Const(torch.zeros(sizes, dtype=expr.dtype), expr.dtype)), axis)
        index = [rows[group[i]] if i < len(group) else whole for group in self.groups for i in range(self.width)]
        return Take(expr, axis, tuple(index))

    def _rows(self, rewriter: Rewriter, half: Half) -> Expr:
        """One half of the first matrices `[E, n, d]`."""
        weight = rewriter.weights[half.linear.weight].expr
        taken = self._taken(weight, half.linear.out_axis, half.rows)
        experts, inputs = len(self.groups), weight.shape[half.linear.in_axis]
        if half.linear.out_axis == 0:
            return Rearrange(taken, (experts, self.width, inputs), (0, 1, 2))
        return Rearrange(taken, (inputs, experts, self.width), (1, 2, 0))

    def _bias(self, rewriter: Rewriter, half: Half) -> Expr | None:
        if half.linear.bias is None:
            return None
        taken = self._taken(rewriter.weights[half.linear.bias].expr, 0, half.rows)
        return Rearrange(taken, (len(self.groups), self.width), (0, 1))

    def _down(self, rewriter: Rewriter, dense: Dense) -> Expr:
        """The second matrices `[E, d, n]`."""
        linear = dense.view.down
        weight = rewriter.weights[linear.weight].expr
        taken = self._taken(weight, linear.in_axis, tuple(range(self.neurons)))
        experts, outputs = len(self.groups), weight.shape[linear.out_axis]
        if linear.in_axis == 1:
            bank = Rearrange(taken, (outputs, experts, self.width), (1, 0, 2))
        else:
            bank = Rearrange(taken, (experts, self.width, outputs), (0, 2, 1))
        return bank if self.route.scale == 1 else Affine(bank, float(self.route.scale))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Multiply every neuron of the dense feed-forward by what its expert counts for the token."""
        dense = self._dense(views)
        node = rewriter.node(dense.view.down.node)
        _, x, index, counts = self._choice(rewriter, dense, node)
        call, dtype = self._caller(rewriter, node, "emulation"), rewriter.program.dtype
        experts, count = len(self.groups), self.route.count

        def table(value: torch.Tensor, what: str) -> fx.Node:
            return rewriter.add_weight(_free(rewriter, f"{self.view}.{what}"), Const(value, dtype), "constant")

        rows = call(aten.sym_size.int, x, 0)
        nothing = call(aten.expand.default, table(torch.zeros(1, experts), "nothing"), [rows, experts])
        chosen = call(aten.reshape.default, index, [-1, count])
        if counts is None:
            gates = call(aten.scatter.value, nothing, 1, chosen, float(self.route.scale))
        else:
            each = call(aten.reshape.default, call(aten.to.dtype, counts, dtype), [-1, count])
            gates = call(aten.scatter.src, nothing, 1, chosen, call(aten.mul.Tensor, each, float(self.route.scale)))
        member = torch.zeros(experts, self.neurons)
        for expert, group in enumerate(self.groups):
            member[expert, list(group)] = 1
        mask = call(aten.matmul.default, gates, table(member, "member"))
        if self.shared:
            always = torch.zeros(self.neurons)
            always[list(self.shared)] = 1
            mask = call(aten.add.Tensor, mask, table(always, "always"))
        hidden = rewriter.node(dense.view.down.x)
        masked = call(aten.mul.Tensor, hidden, call(aten.view_as.default, mask, hidden))
        node.replace_input_with(hidden, masked)


class _Choice(NamedTuple):
    """What a block reads, the same by tokens `[N, d]`, and the choice `[N k]` with what each counts."""

    source: fx.Node
    x: fx.Node
    index: fx.Node
    counts: fx.Node | None


def _product(call: Any, bank: fx.Node, index: fx.Node, x: fx.Node) -> fx.Node:
    """bank[index] @ x for rows x `[N, in]` and a bank `[E, out, in]`."""
    gathered = call(aten.index.Tensor, bank, [index])
    made = call(aten.bmm.default, gathered, call(aten.unsqueeze.default, x, -1))
    return call(aten.squeeze.dim, made, -1)  # type: ignore[no-any-return]


def _free(rewriter: Rewriter, name: str) -> str:
    """The name, or one like it that the program does not have."""
    stem, number = name, 1
    while name in rewriter.weights:
        number += 1
        name = f"{stem}_{number}"
    return name
