"""A program as a function of its weights: what training differentiates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.run import bind_inputs, runnable


class Forward:
    """Runs a program up to chosen nodes on given weights; nothing else of the graph is computed."""

    def __init__(
        self, program: Program, nodes: Iterable[str], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.program, self.device = program, device
        self.nodes = tuple(dict.fromkeys(nodes))
        module = runnable(program, dtype, device)
        graph = module.graph
        by_name = {node.name: node for node in graph.nodes}
        output = next(iter(reversed(graph.nodes)))
        output.args = (tuple(by_name[name] for name in self.nodes),)
        eliminate_dead_code(graph)
        self.module = fx.GraphModule(torch.nn.Module(), graph)
        self.weights = tuple(node.meta["weight"] for node in graph.nodes if "weight" in node.meta)

    def __call__(
        self, weights: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Values of the chosen nodes by name, for inputs by name."""
        values: Any = self.module(
            *(weights[name] for name in self.weights), *bind_inputs(self.program, dict(inputs), self.device)
        )
        return dict(zip(self.nodes, values, strict=True))
