"""From a program with a cache to a Python function for its step: folded, hoisted, tabulated and with fewer, cheaper calls.

The function takes the `Slots` of the step and a flat list of tensors. Three forms are made: for ordinary text in rows of
equal length, which reads tables of what depends on positions (a token tree, too, picks its places from them); for one
token of such text, which needs no transposing; and for everything else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from graphopt.ir.by_expert import ByExpert, PackedBank
from graphopt.ir.leaving import OF_PROMPT, PROMPT, Leaving, leaving
from graphopt.ir.program import Input, Program, specialise
from graphopt.ir.run import fastest
from graphopt.ops.cached import attend, attend_behind, attend_one, cached_attention
from graphopt.ops.library import rms_norm as rms_norm_op
from graphopt.ops.library import rotary
from graphopt.runtime.native import NATIVE, pack, packed_linear, packs, rms_norm, turn
from graphopt.runtime.stages import Stage, counts_rows, place_axis, stages, tables

aten = torch.ops.aten
# A value of the program by its node, or one that only the functions have by its name.
Key: TypeAlias = fx.Node | str
Values: TypeAlias = dict[Key, Any]
_WIDE = (torch.float32, torch.float64)
_VIEWS = (aten.reshape.default, aten.view.default)
_PAGE, _LINE = 4096, 64
# Bytes from which on packed weights are also faster for one row; below, the call costs more than it saves.
_LARGE = 2 * 2**20


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
        program = _for_run(program, dtype, device)
        self.program, self.dtype, self.device = program, dtype, device
        self.order: list[fx.Node] = list(program.graph.graph.nodes)
        self.leaving = leaving(program)
        self.stage = stages(program)
        self.tables = tables(program, self.stage)
        self.values: Values = {}
        self.signed: dict[fx.Node, str] = {}
        for node in self.order:
            if self.stage[node] == Stage.LOAD:
                self.values[node] = self._load(node)
        known = set(self.tables)
        self.forms = {
            "text": _Writer(self, known).form(),
            "token": _Writer(self, known, single=True).form(),
            "ragged": _Writer(self, None).form(),
        }
        roles = {spec.name: spec.role for spec in program.entry.inputs}
        self._pictures = {spec.name: self._none(spec) for spec in program.entry.inputs if spec.role == "pictures"}
        self._rows = [n for n in self.order if counts_rows(n, roles)]
        early = [n for n in self.order if self.stage[n] == Stage.START and n.op != "placeholder"]
        self._early = [n for n in early if n not in self._rows]
        self._placed = self._behind(self.tables)
        wanted: set[Key] = {key for form in self.forms.values() for key in form.takes}
        for node in [*self._early, *self._placed]:
            wanted.update(node.all_input_nodes)
        self.values = {key: value for key, value in self.values.items() if key in wanted}

    def _none(self, spec: Input) -> torch.Tensor:
        """No pictures at all."""
        kind = specialise(spec.dtype, model=self.program.dtype, target=self.dtype, device=self.device)
        return torch.zeros(0, *(int(size) for size in spec.shape[1:]), dtype=kind, device=self.device)

    def _load(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            value = self.program.weights.evaluate(node.meta["weight"], self.dtype, self.device)
            return _stored_bank(value, self.dtype, self.device) if _is_bank(node) else value
        return self.run(node, self.values)

    def run(self, node: fx.Node, values: Mapping[Key, Any]) -> Any:
        """Compute one node."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def behind(self, lengths: fx.Node) -> int:
        """The stage at which what has not left by then is what a cache holds; 0 for all tokens."""
        leaves = [spec.name for spec in self.program.entry.inputs if spec.role == "entries"]
        return leaves.index(lengths.meta["input"]) + 1 if lengths.meta.get("input") in leaves else 0

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
                    if name not in context and name in self._pictures:
                        values[node] = self._pictures[name]
                        continue
                    if name not in context:
                        raise TypeError(f"input {name!r} is missing: give it where the cache is made")
                    values[node] = context[name].to(self.device)
                elif self.stage[node] == Stage.PLACE:
                    places[node] = torch.arange(capacity, device=self.device)[None]
        rows = next(iter(buffers.values())).shape[0]
        values |= dict.fromkeys(self._rows, rows)
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
    """Writes one form of the step; `known` nodes are tables, and `single` says that there is one new token a row."""

    of: Lowered
    known: set[fx.Node] | None
    single: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[Key, fx.Node] = field(default_factory=dict)

    def form(self) -> Form:
        """The step as generated Python over cheap calls."""
        groups = self._products()
        self.slots = self.graph.placeholder("slots")
        for node in self.of.order:
            stage = self.of.stage[node]
            if node.op == "output":
                results = zip(node.args[0], self.of.program.entry.outputs, strict=True)  # type: ignore[arg-type]
                self.graph.output(tuple(None if self._untold(name) else self._operand(n) for n, name in results))
            elif node.op == "call_function" and stage >= Stage.PLACE and node not in (self.known or ()):
                if self._passes(node):
                    self.made[node] = self._value(node.args[0])  # type: ignore[arg-type]
                elif node in groups:
                    self._multiply(groups[node])
                elif node not in self.made:
                    self.made[node] = self._write(node)
        self.graph.eliminate_dead_code(
            lambda n: n.op in ("placeholder", "output") or n.target in (attend, attend_behind, attend_one)
        )
        # A value may pass for others, too: what it was made for comes first.
        keys = {node: key for key, node in reversed(self.made.items())}
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

    def _passes(self, node: fx.Node) -> bool:
        """Whether a node lets tokens leave, come back or merge, none of which happens behind the prompt."""
        found = self.of.leaving
        return self.known is not None and found is not None and _lets_leave(node, found)

    def _untold(self, name: str) -> bool:
        """Whether a result says which tokens of a prompt have stayed, in a form that is given none."""
        return self.known is not None and self.of.leaving is not None and name.startswith(OF_PROMPT)

    def _inputs(self, taken: tuple[Key, ...]) -> dict[str, int]:
        roles = {spec.name: spec.role for spec in self.of.program.entry.inputs}
        found = {}
        for index, key in enumerate(taken):
            if isinstance(key, fx.Node) and "input" in key.meta:
                role = roles[key.meta["input"]]
                if role in ("tokens", "positions", "lengths", "spans", PROMPT):
                    found[role] = index
                elif role == "entries":
                    found[key.meta["input"]] = index
        return found

    def _tables(self, taken: tuple[Key, ...]) -> tuple[tuple[int, int], ...]:
        owners: dict[Key, fx.Node] = {name: sin for sin, name in self.of.signed.items()}
        owners |= {node: node for node in self.known or ()}
        return tuple((i, place_axis(owners[key]) or 0) for i, key in enumerate(taken) if key in owners)

    def _operand(self, node: fx.Node) -> Any:
        """A node's value as an argument: the number of new tokens may be known."""
        if self.single and node.target is aten.sym_size.int and self._is_count(node):
            return 1
        return self._value(node)

    def _is_count(self, node: fx.Node) -> bool:
        roles = {spec.name: spec.role for spec in self.of.program.entry.inputs}
        return roles.get(node.args[0].meta.get("input", "")) == "tokens" and node.args[1] == 1  # type: ignore[union-attr]

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
            head, rest = fx.node.map_arg((args[:5], args[8:]), self._operand)
            mask, sinks, scale, window, softcap = rest
            if behind := self.of.behind(args[5]):  # type: ignore[arg-type]
                return call(attend_behind, (behind, *head, self.slots, *rest))
            if self.single and mask is sinks is window is softcap is None:
                return self._beside(node, call(attend_one, (*head, self.slots, scale)))
            return call(attend, (*head, self.slots, *rest))
        if node.target is rms_norm_op and run.dtype in _WIDE:
            x, weight, eps, _ = args
            name = f"eps {eps} {x.meta['val'].dtype}"  # type: ignore[union-attr]
            shift = self._named(name, lambda: torch.tensor(eps, dtype=run.dtype, device=run.device))
            share = 1.0 / x.meta["val"].shape[-1]  # type: ignore[union-attr]
            return call(rms_norm, (*fx.node.map_arg((x, weight), self._operand), shift, share))
        if self._turns(node):
            return self._turn(node, self._value(args[0]))  # type: ignore[arg-type]
        given, named = fx.node.map_arg((args, dict(node.kwargs)), self._operand)
        if _writes(node) and self.of.stage[args[0]] < Stage.STEP:  # type: ignore[index]
            # What holds for a whole text may not be written into.
            given = (call(torch.clone, (given[0],)), *given[1:])
        return call(NATIVE.get(node.target, node.target), given, named)

    def _beside(self, core: fx.Node, result: fx.Node) -> fx.Node:
        """Heads side by side `[B, 1, H * E]`: of one token they already lie so, whatever the graph does to get there."""
        swapped = _only_reader(core)
        if swapped is None or swapped.target is not aten.transpose.int or set(swapped.args[1:]) != {1, 2}:
            return result
        last = _only_reader(swapped)
        chain = [swapped]
        if last is not None and last.target in (aten.contiguous.default, aten.clone.default):
            chain.append(last)
            last = _only_reader(last)
        if last is None or last.target not in _VIEWS:
            return result
        sizes = fx.node.map_arg(last.args[1], self._operand)
        self.made |= dict.fromkeys(chain, result)
        self.made[last] = self.graph.call_function(torch.reshape, (result, sizes))
        return result

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
        biased = len(group[0].args) > 2 and group[0].args[2] is not None
        bias = (
            self._named(f"bias {name}", lambda: torch.cat([values[node.args[2]] for node in group])) if biased else None
        )  # type: ignore[index]
        x = self._value(group[0].args[0])  # type: ignore[arg-type]
        if self._packed(group):
            weight = self._named(f"packed {name}", lambda: pack(_joined(weights)))
            multiply, rest = packed_linear()
            product = self.graph.call_function(multiply, (x, weight, bias, *rest))
        else:
            weight = self._named(
                f"weight {name}", lambda: _by_columns(_joined(weights)) if biased else _by_columns(_joined(weights)).t()
            )
            multiply = NATIVE[aten.linear.default] if biased else torch.matmul
            product = self.graph.call_function(multiply, (x, weight, bias) if biased else (x, weight))
        if len(group) > 1 and self._split_heads(group, product):
            return
        widths = [node.meta["val"].shape[-1] for node in group]
        self.made |= zip(group, self._pieces(product, widths, -1), strict=True)

    def _pieces(self, x: fx.Node, sizes: list[int], axis: int) -> list[fx.Node]:
        """A value cut along an axis."""
        if len(sizes) == 1:
            return [x]
        cut = self.graph.call_method("split_with_sizes", (x, sizes, axis))
        return [self.graph.call_function(operator.getitem, (cut, i)) for i in range(len(sizes))]

    def _packed(self, group: list[fx.Node]) -> bool:
        """Whether a product reads packed weights: with several rows always, with one if they are large."""
        if not packs(self.of.dtype, self.of.device):
            return False
        entries = sum(node.args[1].meta["val"].numel() for node in group)  # type: ignore[union-attr]
        return not self.single or entries * self.of.dtype.itemsize >= _LARGE

    def _split_heads(self, group: list[fx.Node], product: fx.Node) -> bool:
        """Where every member becomes heads of one size: reshape once, turn those together that turn alike, then slice."""
        chains = [_as_heads(node) for node in group]
        if any(chain is None or chain[0].args[1][:2] != chains[0][0].args[1][:2] for chain in chains):  # type: ignore[index]
            return False
        views, turned = zip(*chains, strict=True)  # type: ignore[arg-type]
        size = views[0].args[1][3]
        if any(view.args[1][3] != size for view in views):
            return False
        call = self.graph.call_function
        rows, count = (self._operand(n) if isinstance(n, fx.Node) else n for n in views[0].args[1][:2])
        if self.single and count == 1:
            whole = self.graph.call_method("view", (product, rows, -1, 1, size))
        else:
            whole = call(torch.transpose, (self.graph.call_method("view", (product, rows, count, -1, size)), 1, 2))
        heads = [node.meta["val"].shape[-1] // size for node in group]
        rotations = [reader for node in turned if self._turns(reader := _only_reader(node)) and reader is not None]
        alike = 0
        while alike < len(rotations) and _alike(turned[alike], rotations[alike], rotations[0]):
            alike += 1
        if alike > 1:
            first, *pieces = self._pieces(whole, [sum(heads[:alike]), *heads[alike:]], 1)
            rotated = self._pieces(self._turn(rotations[0], first), heads[:alike], 1)
            self.made |= zip(rotations, rotated, strict=False)
            pieces = [*rotated, *pieces]
        else:
            pieces = self._pieces(whole, heads, 1)
        self.made |= dict.fromkeys(views, whole)
        self.made |= zip(turned, pieces, strict=True)
        return True

    def _turns(self, node: fx.Node | None) -> bool:
        """Whether a node is a rotation by tables that `turn` computes."""
        wide = self.of.dtype in _WIDE
        return (
            node is not None and node.target is rotary and wide and node.args[2] in (self.known or ()) and _whole(node)
        )

    def _turn(self, node: fx.Node, x: fx.Node) -> fx.Node:
        _, cos, sin, _ = node.args
        name = self.of.signed.setdefault(sin, f"signed {sin.name}")  # type: ignore[arg-type,union-attr]
        half = cos.meta["val"].shape[-1] // 2  # type: ignore[union-attr]
        return self.graph.call_function(turn, (x, self._value(cos), self._value(name), half))  # type: ignore[arg-type]


def _for_run(program: Program, dtype: torch.dtype, device: torch.device | str) -> Program:
    """The program with its graph as it is run: in `dtype` on `device`, banks of experts as one call each."""
    module = fastest(program, dtype, device)
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            with module.graph.inserting_before(node):
                part = module.get_submodule(node.target).forward
                node.replace_all_uses_with(module.graph.call_function(part, node.args, node.kwargs))
            module.graph.erase_node(node)
    return replace(program, graph=module)


def _lets_leave(node: fx.Node, found: Leaving) -> bool:
    ops = torch.ops.graphopt
    passing = (ops.take_tokens.default, ops.put_tokens.default, ops.merge_tokens.default, ops.merge_windows.default)
    sizes = [size for size in node.meta["val"].shape if found.level(size) is not None] if node.target in passing else []
    return bool(sizes) and node in found.needed


def _alike(source: fx.Node, rotation: fx.Node, first: fx.Node) -> bool:
    """Whether a rotation turns `source`, and as the first one turns its own."""
    return rotation.args[0] is source and rotation.args[1:] == first.args[1:]


def _writes(node: fx.Node) -> bool:
    """Whether an op writes into its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _as_heads(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The view `[B, S, heads, size]` and the transpose `[B, heads, S, size]` that alone read a product."""
    view = _only_reader(node)
    if view is None or view.target not in _VIEWS or len(view.args[1]) != 4:  # type: ignore[arg-type]
        return None
    swapped = _only_reader(view)
    if swapped is None or swapped.target is not aten.transpose.int or set(swapped.args[1:]) != {1, 2}:
        return None
    return (view, swapped) if isinstance(view.args[1][3], int) and view.args[1][3] > 0 else None  # type: ignore[index,operator]


def _is_bank(node: fx.Node) -> bool:
    """Whether a weight is a bank `[E, out, in]` that only products of experts read."""
    parts = [(getattr(user.target, "__self__", None), user.args.index(node) - 1) for user in node.users]
    return bool(parts) and all(isinstance(part, ByExpert) and part.turned(number) for part, number in parts)


def _stored_bank(whole: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor | PackedBank:
    """A bank `[E, out, in]` as products of one row read it fastest."""
    if not packs(dtype, device) or whole[0].nbytes < _LARGE:
        return _by_columns(whole)
    multiply, rest = packed_linear()
    return PackedBank(lambda rows, matrix: multiply(rows, matrix, None, *rest), [pack(matrix) for matrix in whole])


def _joined(weights: list[torch.Tensor]) -> torch.Tensor:
    """Weights one below the other; one alone is not copied, as it may be large."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _by_columns(whole: torch.Tensor) -> torch.Tensor:
    """Weights `[.., out, in]` stored by columns: the product with one row reads them faster so.

    Columns a multiple of the page apart share cache sets, which makes products with a few rows slower by half; a gap of
    one cache line behind each keeps them apart.
    """
    rows, columns = whole.shape[-2:]
    gap = _LINE // whole.element_size() if rows * whole.element_size() % _PAGE == 0 else 0
    stored = whole.new_empty(*whole.shape[:-2], columns, rows + gap)[..., :rows]
    return stored.copy_(whole.mT).mT


def _whole(node: fx.Node) -> bool:
    """Whether a rotation turns all features, in halves."""
    x, cos, _, interleaved = node.args
    return not interleaved and cos.meta["val"].shape[-1] == x.meta["val"].shape[-1]  # type: ignore[union-attr]
