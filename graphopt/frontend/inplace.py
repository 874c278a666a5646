"""Writes become values: `x.add_(y)` is `add(x, y)`, a write into a view is a scatter into what it views.

torch.export keeps in-place ops. Later stages move, remove and repeat nodes, which is only right when every node is a value.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from graphopt.diagnostics import CaptureError
from graphopt.frontend.matching import is_op

aten = torch.ops.aten


def functionalise(graph: fx.Graph) -> None:
    """Replace every in-place op, its later reads and the later reads of what shares its memory, in place.

    Raises CaptureError for a write that has no counterpart without one.
    """
    bases: dict[fx.Node, fx.Node | None] = {}
    for node in list(graph.nodes):
        if _writes(node):
            _functional(graph, node, bases)


def _writes(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    first = target._schema.arguments[0]
    return first.alias_info is not None and first.alias_info.is_write


def _functional(graph: fx.Graph, node: fx.Node, bases: dict[fx.Node, fx.Node | None]) -> None:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    chain = [target]  # From the view that is written to the tensor that owns the memory.
    while (base := _base(chain[-1], bases)) is not None:
        chain.append(base)
    family = [chain[-1]]
    for other in graph.nodes:
        if other is node:
            break
        if other not in family and other.op == "call_function" and other.args and other.args[0] in family:
            family += [other] if _base(other, bases) is not None else []
    with graph.inserting_before(node):
        value = _value(graph, node, target)
        for below, base in itertools.pairwise(chain):
            value = _scatter(graph, below, base, value, node)
        renewed = {chain[-1]: value}
        for view in family:
            # The view that was written to as well: later writes may reach it through what it views.
            if view not in renewed:
                base = view.args[0]
                renewed[view] = graph.node_copy(view, lambda n, base=base: renewed[n] if n is base else n)  # type: ignore[misc]
                renewed[view].meta = dict(view.meta)
    later = _after(graph, node)
    for old, new in renewed.items():
        for user in list(old.users):
            if user in later:
                user.replace_input_with(old, new)
    node.replace_all_uses_with(renewed[target])
    graph.erase_node(node)
    for new in reversed(list(renewed.values())):
        if not new.users and new.op == "call_function":
            graph.erase_node(new)


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for other in reversed(graph.nodes):
        if other is node:
            break
        found.add(other)
    return found


def _base(view: fx.Node, bases: dict[fx.Node, fx.Node | None]) -> fx.Node | None:
    """The tensor whose memory a node shares: its op is run once more on its fake inputs to see."""
    if view not in bases:
        bases[view] = None
        first = view.args[0] if view.op == "call_function" and view.args else None
        schema = getattr(view.target, "_schema", None)
        if isinstance(first, fx.Node) and schema is not None and not schema.is_mutable:
            before = first.meta.get("val")
            if isinstance(before, torch.Tensor) and isinstance(view.meta.get("val"), torch.Tensor):
                arguments = fx.node.map_arg((view.args, view.kwargs), lambda n: n.meta["val"])
                # Composite ops of torch 2.11 take symbolic sizes only in Python.
                with enable_python_dispatcher():
                    after = view.target(*arguments[0], **arguments[1])  # type: ignore[operator]
                if isinstance(after, torch.Tensor) and _memory(after) == _memory(before):
                    bases[view] = first
    return bases[view]


def _memory(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _value(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node:
    """What the in-place op leaves in its first argument."""
    op: Any = node.target
    kept = target.meta["val"]
    rest, options = node.args[1:], dict(node.kwargs)
    name = op._schema.name.split("::")[1]
    if name in ("copy_", "set_"):
        source = rest[0]
        if source.meta["val"].dtype != kept.dtype:  # type: ignore[union-attr]
            source = _call(graph, aten.to.dtype, (source, kept.dtype))
        return _call(graph, aten.expand_as.default, (source, target)) if _shape(source) != _shape(target) else source  # type: ignore[return-value]
    if name in ("fill_", "zero_"):
        filling = rest[0] if rest else 0
        if not isinstance(filling, fx.Node):
            return _call(graph, aten.full_like.default, (target, filling))
        return _call(graph, aten.expand_as.default, (_call(graph, aten.to.dtype, (filling, kept.dtype)), target))
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, op._overloadname, None) if packet is not None else None
    if overload is None or overload._schema.is_mutable:
        raise CaptureError.of("mutation", f"{op} writes into a tensor and has no form that does not")
    result = _call(graph, overload, (target, *rest), options)
    if result.meta["val"].dtype != kept.dtype:
        result = _call(graph, aten.to.dtype, (result, kept.dtype))
    return result


def _scatter(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node, node: fx.Node) -> fx.Node:
    """`base` with `value` where `view` looks."""
    rest = view.args[1:]
    if is_op(view, aten.slice):
        return _call(graph, aten.slice_scatter.default, (base, value, *rest))
    if is_op(view, aten.select):
        return _call(graph, aten.select_scatter.default, (base, value, *rest))
    if is_op(view, aten.transpose, aten.t):
        return _call(graph, aten.transpose.int, (value, *(rest or (0, 1))))
    if is_op(view, aten.unsqueeze):
        return _call(graph, aten.squeeze.dim, (value, *rest))
    if is_op(view, aten.alias, aten.detach, aten.to, aten.contiguous, aten.lift_fresh, aten.dropout, aten.clone):
        return value
    if is_op(
        view, aten.view, aten.reshape, aten.flatten, aten.squeeze, aten.unflatten, aten._unsafe_view, aten.view_as
    ):
        return _call(graph, aten.reshape.default, (value, _sizes(graph, base)))
    raise CaptureError.of("mutation", f"{node.target} writes into a view made by {view.target}, which cannot be undone")


def _sizes(graph: fx.Graph, node: fx.Node) -> list[Any]:
    made: list[Any] = []
    for axis, size in enumerate(node.meta["val"].shape):
        made.append(size if isinstance(size, int) else _call(graph, aten.sym_size.int, (node, axis)))
    return made


def _shape(node: Any) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], options: dict[str, Any] | None = None) -> fx.Node:
    """A call with the value that its inputs' values give."""
    new = graph.call_function(target, args, options or {})

    def value(n: fx.Node) -> Any:
        return n.meta["val"]

    new.meta["val"] = target(*fx.node.map_arg(args, value), **fx.node.map_arg(options or {}, value))
    return new
