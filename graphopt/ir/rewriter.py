"""The Rewriter: the only code that changes a graph.

It works on a copy, forwards old nodes to new ones (so that edits planned together stay right), and on exit removes dead
code, drops weights nobody reads, re-propagates shapes and returns a new Program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Dim, Input, Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.shapes import propagate, repropagate
from graphopt.ir.weights import Expr, Weight


class Rewriter:
    """A copy of a program under change.

    Nodes are named by the original program's nodes or their names; `node(...)` gives today's node for either.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.weights = program.weights
        self._forward: dict[fx.Node, fx.Node] = {}
        self._names: dict[str, fx.Node] = {}
        for node in program.graph.graph.nodes:
            copy = self.graph.node_copy(node, lambda n: self._forward[n])
            copy.meta = dict(node.meta)
            self._forward[node] = copy
            self._names[node.name] = copy
        self.by = ""
        self.shared: dict[str, Any] = {}
        """what the edits of one rewrite share, by name"""
        self._inputs = {spec.name: spec for spec in program.entry.inputs}
        self._dims = list(program.dims)
        self._outputs = list(program.entry.outputs)

    def node(self, key: fx.Node | str) -> fx.Node:
        """Today's node for a node (or its name) of the original program."""
        found = self._names.get(key) if isinstance(key, str) else self._forward.get(key, key)
        if found is None:
            raise PlanError.of("stale_node", f"the graph has no node %{key}")
        while found in self._forward:
            found = self._forward[found]
        return found

    def call(self, target: Any, *args: Any, before: fx.Node | None = None, after: fx.Node | None = None) -> fx.Node:
        """Insert a call before or after a node of today; arguments are today's nodes or constants."""
        anchor = before if before is not None else after
        if anchor is None:
            raise ValueError("say where: before= or after=")
        with self.graph.inserting_before(anchor) if before is not None else self.graph.inserting_after(anchor):
            made = self.graph.call_function(target, args)
        made.meta = {"path": anchor.meta["path"]} if "path" in anchor.meta else {}
        if self.by:
            made.meta["by"] = self.by
        return made

    def replace(self, old: fx.Node, new: fx.Node, keep: Callable[[fx.Node], bool] | None = None) -> None:
        """Let users of `old` (of today) read `new`; `keep(user)` true leaves a user alone."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and not (keep and keep(user)))
        if keep is None:
            self._forward[old] = new

    def forward(self, old: fx.Node, new: fx.Node) -> None:
        """Let later edits that name `old` find `new`."""
        self._forward[old] = new

    def bypass(self, exit: fx.Node, entry: fx.Node) -> None:
        """Let everything that reads `exit` read `entry`: what lies between becomes dead."""
        exit.replace_all_uses_with(entry)
        self._forward[exit] = entry

    def set_weight(self, name: str, change: Callable[[Expr], Expr]) -> None:
        """Change the expression of one weight."""
        self.weights = self.weights.with_expr(name, change)

    def add_weight(self, name: str, expr: Expr, kind: str = "parameter") -> fx.Node:
        """Add a weight and return its placeholder."""
        if name in self.weights:
            raise PlanError.of("weight_exists", f"the program already has a weight {name!r}")
        self.weights = self.weights.with_weight(Weight(name, expr, kind))
        last = None
        for node in self.graph.nodes:
            if node.op == "placeholder" and "weight" in node.meta:
                last = node
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(first):
            made = self.graph.placeholder(name.replace(".", "_"))
            made.target = made.name  # `a.b` and `a_b` are two arguments.
        made.meta = {"weight": name}
        return made

    def add_dim(self, dim: Dim) -> None:
        """Add a dynamic dimension that inputs may have."""
        self._dims.append(dim)

    def add_input(self, spec: Input) -> fx.Node:
        """Add an input, last of all, and return its placeholder."""
        if spec.name in self._inputs:
            raise PlanError.of("input_exists", f"the program already has an input {spec.name!r}")
        self._inputs[spec.name] = spec
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            made = self.graph.placeholder(spec.name)
        made.meta = {"input": spec.name}
        return made

    def drop_input(self, name: str) -> None:
        """Let an input go on exit; nothing may read it by then."""
        del self._inputs[name]

    def set_role(self, name: str, role: str) -> None:
        """Let an input mean something else from now on."""
        self._inputs[name] = replace(self._inputs[name], role=role)

    def input_node(self, name: str) -> fx.Node:
        """Today's placeholder of an input."""
        return next(node for node in self.graph.nodes if node.meta.get("input") == name)

    def add_output(self, name: str, node: fx.Node) -> None:
        """Return a node of today as a further result, last of all."""
        if name in self._outputs:
            raise PlanError.of("output_exists", f"the program already has a result {name!r}")
        self._outputs.append(name)
        output = next(iter(reversed(self.graph.nodes)))
        output.args = ((*output.args[0], node),)

    def only_outputs(self, names: Iterable[str]) -> None:
        """Return these results alone, in their order."""
        output = next(iter(reversed(self.graph.nodes)))
        held = dict(zip(self._outputs, output.args[0], strict=True))
        self._outputs = list(names)
        output.args = (tuple(held[name] for name in self._outputs),)

    def weight_node(self, name: str) -> fx.Node:
        """Today's placeholder of a weight."""
        return next(node for node in self.graph.nodes if node.meta.get("weight") == name)

    def finish(self, inputs: tuple[Any, ...] | None = None) -> Program:
        """Close the rewrite: dead code out, unread weights out, shapes propagated, the graph checked."""
        eliminate_dead_code(self.graph)
        self._erase_dropped_inputs()
        self.graph.lint()
        module = fx.GraphModule(self.program.graph, self.graph)
        live = {node.meta["weight"] for node in self.graph.nodes if "weight" in node.meta}
        weights = self.weights.only(live)
        if inputs is None:
            inputs = tuple(self._inputs[node.meta["input"]] for node in self.graph.nodes if "input" in node.meta)
        entry = replace(self.program.entry, inputs=inputs, outputs=tuple(self._outputs))
        dims = tuple(self._dims)
        again = repropagate if dims == self.program.dims else propagate
        again(module, weights, dims, entry)
        return replace(self.program, graph=module, weights=weights, entry=entry, dims=dims)

    def _erase_dropped_inputs(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and "input" in node.meta and node.meta["input"] not in self._inputs:
                if node.users:
                    readers = ", ".join(f"%{user.name}" for user in node.users)
                    raise PlanError.of("input_read", f"{readers} still read the input {node.meta['input']!r}")
                self.graph.erase_node(node)
