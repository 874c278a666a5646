"""The edits of self-contrast: a second run of what depends on the choices of experts, and the logits of both joined."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.rewriter import Rewriter
from graphopt.passes.experts.narrow import Choices, readers, resize, wide_nodes
from graphopt.passes.experts.routing import bank_of
from graphopt.passkit.edits import Edit
from graphopt.views import Experts, Views

aten = torch.ops.aten
# Finite, so that differences of logits stay numbers; far below every logit.
NEVER = -1e4


@dataclass(frozen=True, eq=False)
class Weaken(Edit):
    """Say that a bank is routed otherwise in the second run; `Contrast` makes that run."""

    bank: str
    choices: Choices

    @property
    def candidate(self) -> str:
        """The bank."""
        return self.bank

    def describe(self) -> str:
        """Which choice is left."""
        return f"{self.bank}: choice {self.choices.rank} alone in the weak run"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "weaken", "bank": self.bank, "rank": self.choices.rank}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Leave word for `Contrast`."""
        rewriter.shared.setdefault("weakened", []).append(self)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Leave word for `Contrast`."""
        self.apply(rewriter, views)


@dataclass(frozen=True, eq=False)
class Contrast(Edit):
    """Run again what depends on the weakened choices; return (1 + beta) strong - beta weak where strong is near its best."""

    alpha: float
    beta: float

    @property
    def candidate(self) -> str:
        """The result."""
        return "model:logits"

    def describe(self) -> str:
        """What is joined how."""
        return (
            f"logits: {1 + self.beta:.4g} strong - {self.beta:.4g} weak, from log({self.alpha:.4g}) below the best up"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "contrast", "alpha": self.alpha, "beta": self.beta}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The weak run computes the rows of its one choice alone."""
        self._join(rewriter, _Second(rewriter, views, narrow=True))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """The weak run computes all rows, those of other choices counting nothing."""
        self._join(rewriter, _Second(rewriter, views, narrow=False))

    def _join(self, rewriter: Rewriter, second: _Second) -> None:
        strong = rewriter.node(second.views.program.output_nodes[0])
        weak = second.run(second.views.program.output_nodes[0])
        end = next(iter(reversed(rewriter.graph.nodes)))

        def call(target: Any, *args: Any) -> fx.Node:
            return rewriter.call(target, *args, before=end)

        best = call(aten.amax.default, strong, [-1], True)
        near = call(aten.ge.Tensor, strong, call(aten.add.Tensor, best, math.log(self.alpha)))
        score = call(
            aten.sub.Tensor, call(aten.mul.Tensor, strong, 1 + self.beta), call(aten.mul.Tensor, weak, self.beta)
        )
        made = call(aten.where.ScalarOther, near, score, NEVER)
        rewriter.replace(strong, made, keep=lambda user: user is not end)


class _Second:
    """The second run: copies of all nodes that depend on the choices of weakened banks, before the end of the graph."""

    def __init__(self, rewriter: Rewriter, views: Views, narrow: bool) -> None:
        self.rewriter, self.views, self.narrow = rewriter, views, narrow
        self.end = next(iter(reversed(rewriter.graph.nodes)))
        weakened: list[Weaken] = rewriter.shared["weakened"]
        self.banks = {bank_of(views, edit.bank): edit.choices for edit in weakened}
        self.read: dict[tuple[fx.Node, fx.Node], tuple[Experts, int]] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.routed: dict[Experts, tuple[fx.Node, fx.Node]] = {}
        self.affected: set[fx.Node] = set()
        for bank in self.banks:
            self.affected.update(wide_nodes(views, bank))
            for user in readers(bank):
                self.affected.add(user)
                for position, node in enumerate((bank.index, bank.share)):
                    if node in user.all_input_nodes:
                        self.read[user, node] = bank, position  # type: ignore[index]
        for node in views.program.graph.graph.nodes:
            if any(source in self.affected for source in node.all_input_nodes):
                self.affected.add(node)

    def run(self, result: fx.Node) -> fx.Node:
        """The result's copy; the nodes come in the order of the graph."""
        for node in self.views.program.graph.graph.nodes:
            if node.op != "output":
                self._copy(node)
        if self.narrow:
            for bank, choices in self.banks.items():
                assert choices.count is not None
                resize(self.views, bank, choices.count, self._own)
        return self._copy(result)

    def _own(self, node: fx.Node) -> fx.Node | None:
        return self.copies.get(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.affected:
            return self.rewriter.node(node)
        if node not in self.copies:
            given = {source: self._given(node, source) for source in node.all_input_nodes}
            with self.rewriter.graph.inserting_before(self.end):
                made = self.rewriter.graph.node_copy(node, lambda source: given[source])
            made.meta = dict(node.meta)
            self.copies[node] = made
        return self.copies[node]

    def _given(self, node: fx.Node, source: fx.Node) -> fx.Node:
        if (node, source) not in self.read:
            return self._copy(source)
        bank, position = self.read[node, source]
        if bank not in self.routed:
            assert bank.index is not None
            assert bank.share is not None
            index, share = self._copy(bank.index), self._copy(bank.share)
            self.routed[bank] = self.banks[bank].insert(self.rewriter, index, share, self.end, self.narrow)
        return self.routed[bank][position]
