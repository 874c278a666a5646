"""Lowering: an aten graph becomes a callable of generated kernels and library calls. Read this file first."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from graphopt.backends import attention, experts, loops, products
from graphopt.backends.autotune import Tuner, device_name, tuned
from graphopt.backends.fuse import Group, Partition, impure
from graphopt.backends.kernel import Kernel
from graphopt.backends.load import callable_of
from graphopt.backends.prepare import decompositions, references, share_factors
from graphopt.backends.report import GroupReport, library_reports
from graphopt.backends.running import Lowered
from graphopt.diagnostics import PlanError

# Up to here a product is bound by the bytes of its weights, and a generated kernel may beat the library's.
FEW_ROWS = 16


@dataclass(frozen=True)
class Options:
    """How to lower: `interpret` runs kernels under Triton's interpreter; `cpu` says what runs a graph on a CPU.

    `products`: "auto" generates matrix products with few rows, "triton" all, "library" none. `spec` is the Dynamo door's.
    `tune` chooses block sizes by time on the device, when arguments of new sizes come. `pack` lets a lowered program hold
    large weights in the order that a CPU's products read: what is written into the model later is not seen in them.
    """

    interpret: bool = False
    cpu: str = "eager"
    products: str = "auto"
    backward: str = "eager"
    report: Any = None
    target: str | None = None
    spec: Any = None
    tune: bool = False
    pack: bool = True

    @classmethod
    def of(cls, options: dict[str, Any] | None) -> Options:
        """Checked options; raises PlanError for unknown names and values."""
        given = dict(options or {})
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise PlanError.of(
                "unknown_option", f"unknown option {unknown[0]!r}", help=(f"the options are {', '.join(known)}",)
            )
        made = cls(**given)
        if made.tune and made.interpret:
            raise PlanError.of(
                "tuned_interpreter", "interpreted kernels have no times to choose by", help=("leave tune out",)
            )
        for name, allowed in (
            ("cpu", ("eager", "inductor")),
            ("backward", ("eager", "inductor")),
            ("products", ("auto", "triton", "library")),
        ):
            if getattr(made, name) not in allowed:
                raise PlanError.of(
                    "bad_option", f"{name} is {getattr(made, name)!r}", help=(f"say {' or '.join(allowed)}",)
                )
        return made

    def template(self, node: fx.Node) -> bool:
        """Whether a product or attention becomes a generated kernel: with few rows, unless `products` says more."""
        if attention.is_attention(node):
            return True
        if self.products != "library" and (experts.is_expert_product(node) or experts.is_expert_gather(node)):
            return True
        if not products.is_product(node) or self.products == "library":
            return False
        rows = node.meta["val"].shape[0]
        return self.products == "triton" or (isinstance(rows, int) and rows <= FEW_ROWS)

    def decompositions(self, target: str) -> dict[Any, Any]:
        """What takes a graph for `target` apart: our kernels need one table, Inductor another, library calls none."""
        inductor = self.backward == "inductor" or (self.cpu == "inductor" and not self.kernels_on(target))
        table: dict[Any, Any] = {}
        if inductor:
            from torch._inductor.decomposition import select_decomp_table

            table |= select_decomp_table()
        if self.kernels_on(target):
            return table | decompositions()
        return table | references() if inductor else table

    def kernels_on(self, target: str) -> bool:
        """Whether a graph for `target` becomes generated kernels."""
        return self.interpret or target != "cpu"


def lower_graph(graph: fx.GraphModule, target: str, options: Options) -> Lowered:
    """Lower a functional aten graph whose nodes carry fake tensors in `meta["val"]`."""
    if not options.kernels_on(target):
        if options.cpu == "inductor":
            from torch._inductor.compile_fx import compile_fx_inner

            example = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            compiled = compile_fx_inner(graph, example)
            return Lowered(lambda *a: compiled(list(a)), target, "Inductor's C++", library=library_calls(graph))
        calls = library_reports(graph.graph, ())
        return Lowered(graph.forward, target, "eager library calls", library=library_calls(graph), calls=calls)
    share_factors(graph.graph)
    parts = Partition(graph.graph, build, options.template)
    lowered = fx.GraphModule(graph, rebuild(graph.graph, parts, options))
    mode = "Triton kernels, interpreted" if options.interpret else "Triton kernels"
    groups = [GroupReport.of(group) for group in parts.groups]
    calls = library_reports(graph.graph, parts.home.keys())
    library = library_calls(lowered)
    return Lowered(lowered.forward, target, mode, groups=groups, library=library, calls=calls, graph=lowered)


def build(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Kernel:
    """The kernel of a group, by the template that its nodes ask for; raises Unfusable when there is none."""
    if any(attention.is_attention(node) for node in nodes):
        return attention.build(nodes, outputs)
    if any(experts.is_expert_product(node) for node in nodes):
        return experts.build(nodes, outputs)
    if any(products.is_product(node) for node in nodes):
        return products.build(nodes, outputs)
    return loops.build(nodes, outputs)


def rebuild(graph: fx.Graph, parts: Partition, options: Options) -> fx.Graph:
    """The graph with each group as one call of its kernel; what writes or draws random numbers keeps its place."""
    made = fx.Graph()
    tuner = Tuner(device_name()) if options.tune else None
    mapping: dict[fx.Node, fx.Node] = {}

    def emit(node: fx.Node) -> fx.Node:
        if node in mapping:
            return mapping[node]
        group = parts.home.get(node)
        if group is not None:
            emit_group(group)
            return mapping[node]
        copy = made.node_copy(node, emit)
        mapping[node] = copy
        return copy

    def emit_group(group: Group) -> None:
        kernel = group.kernel
        if kernel is None:
            raise AssertionError("a group without a kernel was kept")
        arguments = [emit(source) for source in kernel.inputs]
        for scalar in kernel.scalars:
            if isinstance(scalar, fx.Node):
                arguments.append(emit(scalar))
            else:
                arguments.append(made.call_function(torch.ops.aten.sym_size.int, (emit(scalar[0]), scalar[1])))
        run = callable_of(kernel, options.interpret) if tuner is None else tuned(kernel, tuner)
        call = made.call_function(run, tuple(arguments))
        call.meta |= {"kernel": kernel, "tuned": options.tune}
        call.name = f"{kernel.template}_{kernel.digest[:6]}_{len(made.nodes)}"
        for position, output in enumerate(kernel.outputs):
            mapping[output] = call
            if len(kernel.outputs) > 1:
                mapping[output] = made.call_function(operator.getitem, (call, position))

    for node in graph.nodes:
        if impure(node):
            for group in parts.groups:
                if group.last < parts.order[node]:
                    emit_group_once(group, mapping, emit)
        if impure(node) and node in parts.home:
            # Its result may be read within its own kernel alone.
            emit_group_once(parts.home[node], mapping, emit)
        elif node.op in ("placeholder", "output", "get_attr") or impure(node):
            emit(node)
    return made


def emit_group_once(group: Group, mapping: dict[fx.Node, fx.Node], emit: Callable[[fx.Node], fx.Node]) -> None:
    """Emit a group that has not been emitted."""
    if group.kernel is not None and group.kernel.outputs[0] not in mapping:
        emit(group.kernel.outputs[0])


def library_calls(graph: fx.GraphModule) -> dict[str, int]:
    """How often each op is called."""
    counts: dict[str, int] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts
