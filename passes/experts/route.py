"""Routing: scores of a linear router, which experts they choose for each token, and what each of these counts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.experts.dense import Unfit

aten = torch.ops.aten
Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Route:
    """How tokens choose among experts.

    `most` experts with the highest scores are looked at. `rank` takes one of them alone (1 the best), `least` drops those
    whose weight is below that share of the best one's. `weighted` multiplies results by the softmax of the scores among
    those chosen, times how many they are, so that equal weights are 1. `by_sequence` averages scores over the tokens of a
    sequence that are no padding, and all of them go where the mean says. `by_token` reads scores from a table by the tokens'
    numbers, so that one routing, made before the first layer, serves all layers. `rounded` rounds weights to the model's
    dtype before they count, as Qwen2-MoE does.
    """

    experts: int
    most: int
    rank: int | None
    least: float | None
    weighted: bool
    by_sequence: bool
    dtype: torch.dtype
    by_token: bool = False
    rounded: bool = False

    @property
    def count(self) -> int:
        """Experts that are computed for a token."""
        return self.most if self.rank is None else 1

    @property
    def scale(self) -> int:
        """What the graph's weights must be multiplied by; it is moved into the experts."""
        return self.count if self.weighted and self.least is None else 1

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the weights: float32 or wider."""
        return torch.promote_types(self.dtype, torch.float32)

    def describe(self) -> str:
        """Who goes where, in words."""
        unit = "sequence" if self.by_sequence else "token"
        if self.rank is not None:
            return f"the expert of rank {self.rank} for each {unit}"
        least = f" at {self.least:g} of the best or more" if self.least is not None else ""
        return f"{self.most} for each {unit}{least}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "most": self.most,
            "rank": self.rank,
            "least": self.least,
            "weighted": self.weighted,
            "by_sequence": self.by_sequence,
        }

    def check(self, x: fx.Node, program: Program) -> None:
        """Raise Unfit when the graph cannot say this routing."""
        if self.by_sequence and not self.by_token and x.meta["val"].dim() != 3:
            raise Unfit("its input has no axis of sequences to route by")
        if self.by_token and not _looked_up(program):
            raise Unfit("the program looks up no tokens `[B, S]` to route by")

    def scores(self, rewriter: Rewriter, call: Call, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """Scores `[..., E]` of what the block reads, or of the tokens."""
        if self.by_token:
            made = call(aten.embedding.default, weight, x)
        else:
            made = call(aten.linear.default, x, weight, *([] if bias is None else [bias]))
        return made if self.wide == self.dtype or self.rounded else call(aten.to.dtype, made, self.wide)

    def choose(self, rewriter: Rewriter, call: Call, scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The choice and what each counts, one after the other for all tokens `[N count]`; None where all count 1.

        Scores are `[N, E]`, or `[B, S, E]` where sequences are routed or tokens looked up.
        """
        values = scores
        if self.by_sequence:
            values = self._pooled(rewriter, call, scores)
        elif self.by_token:
            values = call(aten.reshape.default, scores, [-1, self.experts])
        shares = call(aten.softmax.int, values, -1, *([self.wide] if self.rounded else []))
        best = call(aten.topk.default, shares, self.most)
        weights, chosen = (call(operator.getitem, best, i) for i in (0, 1))
        if self.rank is not None:
            weights, chosen = (call(aten.slice.Tensor, n, -1, self.rank - 1, self.rank) for n in (weights, chosen))
        counts = self._weights(call, weights)
        if counts is not None and self.rounded and self.wide != self.dtype:
            counts = call(aten.to.dtype, counts, self.dtype)
        if self.by_sequence:
            chosen = _each_token(call, scores, chosen, self.count)
            counts = None if counts is None else _each_token(call, scores, counts, self.count)
        counts = None if counts is None else call(aten.reshape.default, counts, [-1])
        return call(aten.reshape.default, chosen, [-1]), counts

    def _weights(self, call: Call, shares: fx.Node) -> fx.Node | None:
        if self.least is None:
            return (
                call(aten.div.Tensor, shares, call(aten.sum.dim_IntList, shares, [-1], True)) if self.weighted else None
            )
        bound = call(aten.mul.Tensor, call(aten.slice.Tensor, shares, -1, 0, 1), self.least)
        kept = call(aten.to.dtype, call(aten.ge.Tensor, shares, bound), self.wide)
        if not self.weighted:
            return kept
        shares = call(aten.mul.Tensor, shares, kept)
        mean = call(
            aten.div.Tensor,
            call(aten.sum.dim_IntList, shares, [-1], True),
            call(aten.sum.dim_IntList, kept, [-1], True),
        )
        return call(aten.div.Tensor, shares, mean)

    def _pooled(self, rewriter: Rewriter, call: Call, scores: fx.Node) -> fx.Node:
        """Mean scores `[B, E]` over the tokens that are no padding."""
        padding = next((spec.name for spec in rewriter.program.entry.inputs if spec.role == "padding"), None)
        if padding is None:
            return call(aten.mean.dim, scores, [1])
        real = call(aten.to.dtype, rewriter.input_node(padding), self.wide)
        column = call(aten.unsqueeze.default, real, -1)
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, scores, column), [1])
        return call(aten.div.Tensor, total, call(aten.sum.dim_IntList, real, [1], True))


def _each_token(call: Call, source: fx.Node, value: fx.Node, count: int) -> fx.Node:
    """What holds for a sequence `[B, k]`, for each of its tokens `[B S, k]`."""
    batch, length = (call(aten.sym_size.int, source, axis) for axis in (0, 1))
    spread = call(aten.expand.default, call(aten.unsqueeze.default, value, 1), [batch, length, count])
    return call(aten.reshape.default, spread, [-1, count])


def _looked_up(program: Program) -> bool:
    tokens = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    lookups = [n for n in program.graph.graph.nodes if n.target is aten.embedding.default]
    return any(isinstance(n.args[1], fx.Node) and n.args[1].meta.get("input") in tokens for n in lookups)
