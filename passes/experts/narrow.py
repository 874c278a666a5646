"""Other choices of a router's experts: what a bank reads instead, and the sizes that follow from fewer choices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.reach import ancestors
from graphopt.ir.rewriter import Rewriter
from graphopt.views import Atom, Experts, Views, leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class Choices:
    """Which of a router's choices count: the one of rank `rank` alone, the best `top_k`, or those of share `below` or more.

    `rank` counts from 1; its choice counts 1. The best `top_k` and what `below` (a share of the best one's share) leaves
    share what all had. Tokens whose input's absolute values sum to `protected` or more keep all choices.
    """

    rank: int | None = None
    top_k: int | None = None
    below: float | None = None
    protected: float | None = None

    @property
    def count(self) -> int | None:
        """How many choices are left; None when as many as before."""
        return 1 if self.rank is not None else self.top_k

    def reason(self, bank: Experts) -> str | None:
        """Why a bank cannot be routed so."""
        if bank.index is None or bank.share is None or bank.top_k is None:
            return "the graph does not show which experts a token goes to, and what each counts"
        wanted = self.rank or self.top_k or 1
        if wanted > bank.top_k:
            return f"it chooses {bank.top_k} experts for each token, not {wanted}"
        if self.top_k == bank.top_k or (bank.top_k == 1 and self.rank is None):
            return f"keeps all {bank.top_k} choices"
        if self.below == 0:
            return "no choice counts less than nothing"
        return None

    def insert(
        self,
        rewriter: Rewriter,
        index: fx.Node,
        share: fx.Node,
        before: fx.Node,
        narrow: bool,
        source: fx.Node | None = None,
    ) -> tuple[fx.Node, fx.Node]:
        """Nodes of the new choices and what they count; as wide as before, with zeros, unless `narrow`.

        `source` is what the experts read, where tokens are protected by it.
        """

        def call(target: object, *args: object) -> fx.Node:
            return rewriter.call(target, *args, before=before)

        if self.below is not None:
            best = call(aten.amax.default, share, [-1], True)
            least = call(aten.mul.Tensor, best, self.below)
            kept = call(aten.ge.Tensor, share, least)
            if self.protected is not None and source is not None:
                size = call(aten.sum.dim_IntList, call(aten.abs.default, source), [-1], True)
                if size.args[0].args[0].meta["val"].dim() != share.meta["val"].dim():  # type: ignore[union-attr]
                    size = call(aten.reshape.default, size, [-1, 1])
                kept = call(aten.logical_or.default, kept, call(aten.ge.Scalar, size, self.protected))
            left = call(aten.where.ScalarOther, kept, share, 0.0)
            return index, _as_before(call, share, left)
        best = call(aten.topk.default, share, self.rank or self.top_k)
        values, places = (call(operator.getitem, best, i) for i in (0, 1))
        if self.rank is not None:
            values, places = (call(aten.slice.Tensor, part, -1, self.rank - 1, self.rank) for part in (values, places))
            # It counts 1, and has the gradient of its share, so that the router can still be trained.
            values = call(aten.add.Tensor, call(aten.sub.Tensor, values, call(aten.detach.default, values)), 1.0)
        else:
            values = _as_before(call, share, values)
        if narrow:
            return call(aten.gather.default, index, -1, places), values
        return index, call(aten.scatter.src, call(aten.zeros_like.default, share), -1, places, values)


def _as_before(call: Callable[..., fx.Node], share: fx.Node, left: fx.Node) -> fx.Node:
    """What is left, scaled so that it sums to what all shares did."""
    total, rest = (call(aten.sum.dim_IntList, part, [-1], True) for part in (share, left))
    return call(aten.mul.Tensor, left, call(aten.div.Tensor, total, rest))


def readers(bank: Experts) -> set[fx.Node]:
    """Nodes that read a bank's choices or shares to use them, not to compute the shares."""
    assert bank.index is not None
    assert bank.share is not None
    before = ancestors([bank.share])
    return {user for node in (bank.index, bank.share) for user in node.users if user not in before}


def choice_leaf(views: Views, bank: Experts) -> Atom | None:
    """The leaf that numbers the choices of one token; None when there is one."""
    assert bank.index is not None
    found = list(leaves(views.labels.of(bank.index)[-1]))
    return found[0] if len(found) == 1 else None


def wide_nodes(views: Views, bank: Experts) -> list[fx.Node]:
    """Nodes behind a router with an entry for each choice of each token, those that repeat tokens among them."""
    leaf = choice_leaf(views, bank)
    if leaf is None:
        return []
    assert bank.index is not None
    assert bank.share is not None
    before = ancestors([bank.index, bank.share])
    return [
        node
        for node, axes in views.labels.axes.items()
        if node not in before
        and node.op == "call_function"
        and axes
        and not isinstance(axes[0], list)
        and any(leaf in set(leaves(axis)) for axis in axes)
    ]


def resize(views: Views, bank: Experts, count: int, today: Callable[[fx.Node], fx.Node | None]) -> None:
    """Rewrite the sizes that spell out how many choices a token has; `today` gives the node to change, or None."""
    leaf = choice_leaf(views, bank)
    if leaf is None:
        return
    for node in wide_nodes(views, bank):
        node_today = today(node)
        if node_today is None:
            continue
        axes = views.labels.of(node)
        held = [leaf in set(leaves(axis)) for axis in axes]
        if getattr(node.target, "overloadpacket", None) is aten.repeat_interleave:
            if node.args[1] == leaf.size:
                node_today.args = (node_today.args[0], count, *node_today.args[2:])
            continue
        arguments = list(node_today.args)
        for position, given in enumerate(arguments):
            if isinstance(given, list | tuple) and len(given) == len(axes) and _spells_shape(node, position):
                arguments[position] = [
                    _size(node, size, leaf.size, count) if inside else size
                    for size, inside in zip(given, held, strict=True)
                ]
        node_today.args = tuple(arguments)


def _spells_shape(node: fx.Node, position: int) -> bool:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return position < len(schema) and schema[position].name in ("size", "shape")


def _size(node: fx.Node, size: object, old: int, new: int) -> object:
    if isinstance(size, fx.Node):
        if getattr(size.target, "overloadpacket", None) is aten.sym_size:
            return size
        raise PlanError.of(
            "symbolic_size",
            f"%{size.name} computes a size from the number of choices and a symbolic one together",
            notes=(f"at {node.meta.get('path', node.name)}, %{node.name}",),
        )
    assert isinstance(size, int)
    return size if size == -1 else size // old * new
