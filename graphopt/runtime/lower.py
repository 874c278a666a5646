"""From a program with a cache to a Python function for its step: folded, hoisted, tabulated and with fewer, cheaper calls.

The function takes the `Slots` of the step and a flat list of tensors. Two forms are made: one for ordinary text in rows
of equal length, which reads tables of what depends on positions, and one for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from graphopt.ir.program import Program, specialise
from graphopt.ops.cached import attend, cached_attention
from graphopt.ops.library import rms_norm as rms_norm_op
from graphopt.ops.library import rotary
from graphopt.runtime.native import NATIVE, rms_norm, turn
from graphopt.runtime.stages import Stage, place_axis, stages, tables

aten = torch.ops.aten
# A value of the program by its node, or one that only the functions have by its name.
Key: TypeAlias = fx.Node | str
Values: TypeAlias = dict[Key, Any]
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Form:
    """One function of the step, and what it takes behind the slots, in order.

    `inputs` says where the step's own inputs go, by role; `tables` where a slice of a table does, and its axis.
    """

    call: Callable[..., tuple[torch.Tensor, ...]]
    takes: tuple[Key, ...]
    inputs: Mapping[str, int]
    tables: tuple[tuple[int, int], ...]

    def fixed(self, values: Values) -> list[Any]:
        """The arguments as far as they hold for a whole text."""
        return [values.get(key) for key in self.takes]


class Lowered:
    """A program's step as functions, its folded values, and what to compute when a text starts."""

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device | str) -> None:
        self.program, self.dtype, self.device = program, dtype, device
        self.order: list[fx.Node] = list(program.graph.graph.nodes)
        self.stage = stages(program)
        self.tables = tables(program, self.stage)
        self.values: Values = {}
        self.signed: dict[fx.Node, str] = {}
        for node in self.order:
            if self.stage[node] == Stage.LOAD:
                self.values[node] = self._load(node)
        self.text = _Writer(self, set(self.tables)).form()
        self.other = _Writer(self, set()).form()
        self._early = [n for n in self.order if self.stage[n] == Stage.START and n.op != "placeholder"]
        self._placed = self._behind(self.tables)
        wanted: set[Key] = {*self.text.takes, *self.other.takes}
        for node in [*self._early, *self._placed]:
            wanted.update(node.all_input_nodes)
        self.values = {key: value for key, value in self.values.items() if key in wanted}

    def _load(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.program.weights.evaluate(node.meta["weight"], self.dtype, self.device)
        return self.run(node, self.values)

    def run(self, node: fx.Node, values: Mapping[Key, Any]) -> Any:
        """Compute one node."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        args, kwargs = self.specialised(args), self.specialised(kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def specialised(self, arguments: Any) -> Any:
        """Arguments with the dtype and device of this run."""

        def one(value: Any) -> Any:
            return specialise(value, model=self.program.dtype, target=self.dtype, device=self.device)

        return fx.node.map_aggregate(arguments, one)

    def _behind(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Nodes computed by place that some nodes need, themselves included, in order."""
        wanted, stack = set(nodes), list(nodes)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in wanted and self.stage[source] == Stage.PLACE:
                    wanted.add(source)
                    stack.append(source)
        return [node for node in self.order if node in wanted and node.op != "placeholder"]

    def start(self, context: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], capacity: int) -> Values:
        """What holds for a whole text: results that depend on the context, and tables by place `[1, .., C, ..]`.

        Raises TypeError when an input of the context is missing.
        """
        values: Values = dict(self.values)
        places: Values = {}
        for node in self.order:
            if "input" in node.meta:
                name = node.meta["input"]
                if name in buffers:
                    values[node] = buffers[name]
                elif self.stage[node] == Stage.START:
                    if name not in context:
                        raise TypeError(f"input {name!r} is missing: give it where the cache is made")
                    values[node] = context[name].to(self.device)
                elif self.stage[node] == Stage.PLACE:
                    places[node] = torch.arange(capacity, device=self.device)[None]
        for node in self._early:
            values[node] = self.run(node, values)
        places |= values
        for node in self._placed:
            places[node] = self.run(node, places)
        values |= {node: places[node] for node in self.tables}
        for sin, name in self.signed.items():
            half = sin.meta["val"].shape[-1] // 2
            values[name] = torch.cat([-values[sin][..., :half], values[sin][..., half:]], dim=-1)
        return values


@dataclass
class _Writer:
    """Writes one form of the step; `known` nodes are tables."""

    of: Lowered
    known: set[fx.Node]
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[Key, fx.Node] = field(default_factory=dict)

    def form(self) -> Form:
        """The step as generated Python over cheap calls."""
        groups = self._products()
        self.slots = self.graph.placeholder("slots")
        for node in self.of.order:
            stage = self.of.stage[node]
            if node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self._value))
            elif node.op == "call_function" and stage >= Stage.PLACE and node not in self.known:
                if node in groups:
                    self._multiply(groups[node])
                elif node not in self.made:
                    self.made[node] = self._write(node)
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or n.target is attend)
        keys = {node: key for key, node in self.made.items()}
        takes = [n for n in self.graph.nodes if n.op == "placeholder" and n is not self.slots and n.users]
        clean = fx.Graph()
        copies = {self.slots: clean.placeholder("slots")}
        copies |= {node: clean.placeholder(f"v{i}") for i, node in enumerate(takes)}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                copies[node] = clean.node_copy(node, copies.__getitem__)
        module = fx.GraphModule(torch.nn.Module(), clean)
        taken = tuple(keys[node] for node in takes)
        return Form(module.forward, taken, self._inputs(taken), self._tables(taken))

    def _inputs(self, taken: tuple[Key, ...]) -> dict[str, int]:
        roles = {spec.name: spec.role for spec in self.of.program.entry.inputs}
        found = {}
        for index, key in enumerate(taken):
            if isinstance(key, fx.Node) and "input" in key.meta:
                role = roles[key.meta["input"]]
                if role in ("tokens", "positions", "lengths", "ancestors"):
                    found[role] = index
        return found

    def _tables(self, taken: tuple[Key, ...]) -> tuple[tuple[int, int], ...]:
        owners: dict[Key, fx.Node] = {name: sin for sin, name in self.of.signed.items()}
        owners |= {node: node for node in self.known}
        return tuple((i, place_axis(owners[key]) or 0) for i, key in enumerate(taken) if key in owners)

    def _value(self, key: Key) -> fx.Node:
        """A value inside the function: computed above, or taken."""
        if key not in self.made:
            with self.graph.inserting_after(self.slots):
                self.made[key] = self.graph.placeholder(f"taken_{len(self.made)}")
        return self.made[key]

    def _named(self, name: str, make: Callable[[], torch.Tensor]) -> fx.Node:
        """A value that both forms may share, made once."""
        if name not in self.of.values:
            self.of.values[name] = make()
        return self._value(name)

    def _write(self, node: fx.Node) -> fx.Node:
        """One node, by the cheapest call that computes it."""
        call, args, run = self.graph.call_function, node.args, self.of
        if node.target is cached_attention:
            head, rest = fx.node.map_arg((args[:5], args[8:]), self._value)
            return call(attend, (*head, self.slots, *rest))
        if node.target is rms_norm_op and run.dtype in _WIDE:
            x, weight, eps, _ = args
            name = f"eps {eps} {x.meta['val'].dtype}"  # type: ignore[union-attr]
            shift = self._named(name, lambda: torch.tensor(eps, dtype=run.dtype, device=run.device))
            share = 1.0 / x.meta["val"].shape[-1]  # type: ignore[union-attr]
            return call(rms_norm, (*fx.node.map_arg((x, weight), self._value), shift, share))
        if node.target is rotary and run.dtype in _WIDE and args[2] in self.known and _whole(node):
            x, cos, sin, _ = args
            name = run.signed.setdefault(sin, f"signed {sin.name}")  # type: ignore[arg-type,union-attr]
            half = cos.meta["val"].shape[-1] // 2  # type: ignore[union-attr]
            return call(turn, (*fx.node.map_arg((x, cos), self._value), self._value(name), half))
        given, named = fx.node.map_arg((args, dict(node.kwargs)), self._value)
        return call(NATIVE.get(node.target, node.target), run.specialised(given), run.specialised(named))

    def _products(self) -> dict[fx.Node, list[fx.Node]]:
        """Products of activations with weights; those that read the same and are alike count as one, under its first."""
        groups: dict[Any, list[fx.Node]] = {}
        for node in self.of.order:
            if node.target is aten.linear.default and self.of.stage[node] == Stage.STEP:
                weights = [a for a in node.args[1:] if isinstance(a, fx.Node)]
                if all(self.of.stage[weight] == Stage.LOAD for weight in weights):
                    groups.setdefault((node.args[0], len(weights)), []).append(node)
        return {group[0]: group for group in groups.values()}

    def _multiply(self, group: list[fx.Node]) -> None:
        """One product for a group, of which each member takes its slice."""
        values, name = self.of.values, group[0].name
        weights = [values[node.args[1]] for node in group if node.args[1] in values]
        weight = self._named(f"weight {name}", lambda: _by_columns(weights))
        args = [self._value(group[0].args[0]), weight]  # type: ignore[arg-type]
        if len(group[0].args) > 2 and group[0].args[2] is not None:
            args.append(self._named(f"bias {name}", lambda: torch.cat([values[node.args[2]] for node in group])))  # type: ignore[index]
        product = self.graph.call_function(NATIVE[aten.linear.default], tuple(args))
        start = 0
        for node in group:
            width = node.meta["val"].shape[-1]
            whole = len(group) == 1
            self.made[node] = product if whole else self.graph.call_function(torch.narrow, (product, -1, start, width))
            start += width


def _by_columns(weights: list[torch.Tensor]) -> torch.Tensor:
    """Weights `[out, in]` one below the other, stored by columns: the product with one row reads them faster so."""
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    return whole.t().contiguous().t()


def _whole(node: fx.Node) -> bool:
    """Whether a rotation turns all features, in halves."""
    x, cos, _, interleaved = node.args
    return not interleaved and cos.meta["val"].shape[-1] == x.meta["val"].shape[-1]  # type: ignore[union-attr]
