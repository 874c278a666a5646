"""What the experts of a bank make of rows of calibration text: of each other's rows, and of their own when rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.expressions import Const
from graphopt.ir.packed import Packed
from graphopt.ir.program import Program
from graphopt.ir.run import runnable
from graphopt.observe import Statistics, Tap
from graphopt.observe.stream import compute
from graphopt.select.score import routing_tap
from graphopt.views import Experts


def row_taps(bank: Experts) -> tuple[Tap, ...]:
    """The rows that a bank reads, its choices and what they count; raises PlanError when the graph does not show them."""
    routing = routing_tap(bank)
    return tuple(Tap(name, "rows") for name in (bank.source.name, routing.node, str(routing.other)))


class ExpertRows:
    """A bank and the rows that it read: runs the part of the graph from there to what each choice adds, in float32."""

    def __init__(self, program: Program, bank: Experts, statistics: Statistics, most: int | None = None) -> None:
        if bank.weighted is None or bank.index is None or bank.share is None:
            raise PlanError.of("no_routing", f"the graph does not show the rows that each expert of {bank.path} makes")
        self.bank = bank
        nodes = {node.name: node for node in runnable(program, torch.float32, "cpu").graph.nodes}
        self._target = nodes[bank.weighted.name]
        self._index, self._share = nodes[bank.index.name], nodes[bank.share.name]
        self._given: dict[fx.Node, Any] = {}
        for tap in row_taps(bank):
            value = statistics.rows(tap.node).rows[:most]
            value = value if value.dim() == program.nodes[tap.node].meta["val"].dim() else value[None]
            self._given[nodes[tap.node]] = value.float() if value.is_floating_point() else value
        self._inside = self._between()
        self._weights = {
            node: program.weights.evaluate(node.meta["weight"], torch.float32)
            for node in self._inside
            if "weight" in node.meta
        }

    def _between(self) -> list[fx.Node]:
        """What the result depends on, in order, up to the nodes whose values are given."""
        found: set[fx.Node] = set()
        stack = [self._target]
        while stack:
            node = stack.pop()
            if node not in found and node not in self._given:
                found.add(node)
                stack.extend(node.all_input_nodes)
        return [node for node in self._target.graph.nodes if node in found]

    def _run(self, changed: Mapping[fx.Node, Any]) -> torch.Tensor:
        values = {**self._given, **self._weights, **changed}
        for node in self._inside:
            if node in values:
                continue
            if node.op == "placeholder":
                raise PlanError.of(
                    "no_routing",
                    f"what the experts of {self.bank.path} make depends on {node.name!r} by more than what they read",
                )
            values[node] = compute(node, values)
        result: torch.Tensor = values[self._target]
        return result

    def rounding_errors(self, widths: tuple[int, ...], group: int) -> torch.Tensor:
        """Norms `[experts, widths]`, float64, of the change of the layer's output when one expert alone is rounded.

        A token goes to an expert once at most, so that rounding all experts at once shows the error of each in the rows
        that it made.
        """
        bank, index = self.bank, self._given[self._index].reshape(-1)
        matrices = {linear.weight: linear for linear in (bank.up, bank.gate or bank.up, bank.down)}
        whole = self._run({})
        columns = []
        for bits in widths:
            rounded = {}
            for node, value in self._weights.items():
                linear = matrices.get(node.meta["weight"])
                if linear is not None:
                    turned = linear.in_axis == value.dim() - 2
                    rounded[node] = Packed(Const(value, value.dtype), "value", bits, group, turned).compute([value])
            change = (self._run(rounded) - whole).to(torch.float64)
            squares = change.reshape(index.numel(), -1).square().sum(-1)
            columns.append(squares.new_zeros(bank.experts).index_add_(0, index, squares).sqrt())
        return torch.stack(columns, dim=1)

    def outputs(self) -> torch.Tensor:
        """What each expert makes of every row, `[experts, rows * hidden]`: as if all tokens went to it with share 1."""
        index, share = self._given[self._index], self._given[self._share]
        chosen = int(index.shape[-1])
        made = []
        for expert in range(self.bank.experts):
            rows = self._run({self._index: torch.full_like(index, expert), self._share: torch.ones_like(share)})
            made.append(rows.reshape(-1, chosen, rows.shape[-1])[:, 0].reshape(-1))
        return torch.stack(made)
