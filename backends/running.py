"""What lowering makes, as it is called: with arguments in graph order, or as a program with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.backends.library import pack
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.run import bind_inputs

if TYPE_CHECKING:
    import sympy

    from graphopt.backends.replay import Capture


@dataclass
class Lowered:
    """A lowered graph: call it with a list of arguments in graph order."""

    run: Callable[..., Any]
    target: str
    mode: str
    backward: str | None = None
    groups: list[Any] = field(default_factory=list)
    library: dict[str, int] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    graph: fx.GraphModule | None = None
    _boxed_call: bool = True

    def __call__(self, arguments: list[Any]) -> Any:
        """Run; the list is emptied, so that arguments are freed as they are used."""
        values = list(arguments)
        arguments.clear()
        return self.run(*values)

    def describe(self) -> dict[str, Any]:
        """Plain data: what runs as which kernel, and what as library calls."""
        return {
            "target": self.target,
            "mode": self.mode,
            "backward": self.backward,
            "groups": [group.describe() for group in self.groups],
            "library": dict(sorted(self.library.items())),
        }


@dataclass
class LoweredProgram:
    """A program with its weights on a device and its graph as kernels; call it as `program.module()`'s result.

    `symbols` names the dimensions that stayed symbolic in the groups' formulae; `packed` the weights that are held in
    oneDNN's order, turned ones as true.
    """

    program: Program
    lowered: Lowered
    device: str
    dtype: torch.dtype
    symbols: Mapping[sympy.Symbol, sympy.Expr]
    packed: Mapping[str, bool] = field(default_factory=dict)
    _weights: list[torch.Tensor] | None = field(default=None, repr=False)

    def __call__(self, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Run on inputs by name; returns a tuple as in `entry.outputs`."""
        return self._run(lambda *arguments: tuple(self.lowered(list(arguments))), inputs)

    def replayed(self, capture: Capture | None = None) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The program by CUDA graphs: called with inputs by name, it launches all kernels of a step at once.

        Caches must stay where they are from step to step, and every set of shapes is recorded once. `capture` records
        otherwise than by CUDA. Raises PlanError when launches cannot be repeated, with the reason.
        """
        from graphopt.backends.replay import Replay, cuda_graph, obstacle

        reason = obstacle(self.lowered)
        if reason is None and capture is None and self.device == "cpu":
            reason = "a CPU has no graphs of launches"
        if reason is not None:
            raise PlanError.of("no_replay", f"the program cannot be replayed: {reason}")
        held = [True] * len(self._names())
        held += [spec.role == "cache" for spec in self.program.entry.inputs]
        replay = Replay(lambda *arguments: tuple(self.lowered(list(arguments))), held, capture or cuda_graph)
        return lambda **inputs: self._run(replay, inputs)

    def _names(self) -> list[str]:
        return [node.meta["weight"] for node in self.program.graph.graph.nodes if "weight" in node.meta]

    def _weight(self, name: str) -> torch.Tensor:
        value = self.program.weights.evaluate(name, self.dtype, self.device)
        return pack(value, self.packed[name]) if name in self.packed else value

    def _run(self, run: Callable[..., Any], inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        if self._weights is None:
            self._weights = [self._weight(name) for name in self._names()]
        # What was compiled for inputs without holes must not get positions that are one row for the whole batch.
        bound = [value.contiguous() for value in bind_inputs(self.program, inputs, self.device, self.dtype)]
        with torch.no_grad():
            return tuple(run(*self._weights, *bound))
