"""Program: the one object that every stage takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.weights import WeightStore


@dataclass(frozen=True)
class Dim:
    """A named dynamic dimension with its inclusive range and the size (2 or more) that shapes are propagated with."""

    name: str
    low: int
    high: int
    hint: int


@dataclass(frozen=True)
class Input:
    """One argument of the program: `shape` mixes dimension names and fixed sizes; `role` says what it means.

    Roles: `tokens`, `padding` (1 at real tokens), `positions`, `pictures` (those that placeholder tokens stand for),
    `values` (anything else); in a program with a cache also
    `lengths` (entries that each row's cache holds), `spans` (which new tokens see which), `cache` and, where tokens
    leave, `prompt` `[B, P]` (which of the first tokens choices are made among) and `entries` (`lengths` behind a stage);
    in one with draft heads `ahead` `[B, S, K]` (the K tokens behind each position).
    """

    name: str
    shape: tuple[str | int, ...]
    dtype: torch.dtype
    role: str = "values"


@dataclass(frozen=True)
class Entry:
    """The calling convention: arguments in graph order and the names of the results."""

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where a program came from: what the checkpoint writer and the reports need, and nothing else reads.

    `config` is the source's config.json as data; `path` the directory with tokenizer files.
    """

    name: str = "model"
    config: Mapping[str, Any] | None = None
    architecture: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Applied:
    """One step of the trail: what a pass did, what it declined, what was proved and what it cost."""

    step: str
    options: Mapping[str, Any]
    effect: str
    edits: tuple[Mapping[str, Any], ...]
    declines: tuple[Mapping[str, Any], ...]
    certificate: Mapping[str, Any]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    place: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Program:
    """A model as a graph of aten and graphopt ops with named, lifted weights.

    Placeholders come first: one a weight (`meta["weight"]` holds its name), then one an input (`meta["input"]`). Every
    node carries a fake tensor in `meta["val"]`. Programs are values: passes return new ones.
    """

    graph: fx.GraphModule
    weights: WeightStore
    dims: tuple[Dim, ...]
    entry: Entry
    dtype: torch.dtype
    trail: tuple[Applied, ...] = ()
    origin: Origin = field(default_factory=Origin)

    @property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes by name."""
        return {node.name: node for node in self.graph.graph.nodes}

    @property
    def weight_nodes(self) -> dict[str, fx.Node]:
        """Placeholders of weights by weight name."""
        return {node.meta["weight"]: node for node in self.graph.graph.nodes if "weight" in node.meta}

    @property
    def output_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that are returned, in the order of `entry.outputs`."""
        output = next(iter(reversed(self.graph.graph.nodes)))
        return tuple(output.args[0])  # type: ignore[arg-type]

    @property
    def cached(self) -> bool:
        """Whether the program decodes with a cache of keys and values."""
        return any(spec.role == "cache" for spec in self.entry.inputs)

    def module(
        self, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
    ) -> Callable[..., tuple[torch.Tensor, ...]]:
        """A callable with evaluated weights: takes inputs by name, returns a tuple as in `entry.outputs`.

        With dtype float64 weights are evaluated without storage rounding and every cast widens to float64; None keeps
        the storage dtypes.
        """
        from graphopt.ir.run import Runner

        return Runner(self, dtype, device)


def specialise(value: Any, *, model: torch.dtype, target: torch.dtype, device: torch.device | str) -> Any:
    """Rewrite dtype and device constants of one argument for a run in `target` on `device`.

    The captured model dtype becomes `target`; casts to float32 stay float32 (statistics) unless the target is wider.
    """
    if isinstance(value, torch.dtype) and value.is_floating_point:
        if value == model:
            return target
        return torch.promote_types(value, target) if target == torch.float64 else value
    if isinstance(value, torch.device):
        return torch.device(device)
    return value
