"""Finding feed-forwards and expert banks: products joined by an elementwise activation."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from graphopt.views.atoms import Atom, flat, leaves, size_of
from graphopt.views.kinds import Experts, FeedForward, Unseen
from graphopt.views.labels import Labels
from graphopt.views.routing import Linear, behind
from graphopt.views.trace import (
    TRANSPARENT,
    activation,
    chosen,
    common_path,
    elementwise_sources,
    gate_of,
    path,
    share,
    spelled,
)

aten = torch.ops.aten


def find_feed_forwards(labels: Labels, cores: Collection[fx.Node]) -> tuple[list[FeedForward], list[Unseen]]:
    """Every pair (or gated triple) of products joined by an elementwise activation, and near misses with the reason."""
    found: list[FeedForward] = []
    missed: list[Unseen] = []
    for down in labels.linears.values():
        joined = _joined(labels, down, labels.linears)
        if joined is None and (up := _gated_by_tokens(labels, down)) is not None:
            reason = "its neurons are multiplied by an embedding of the tokens; they are left alone"
            missed.append(Unseen(f"feed-forward {common_path(path(up.node), path(down.node))}", down.node.name, reason))
        if joined is None or any(p.node in cores for p in joined[0]):
            continue
        products, activations = joined
        place = common_path(path(products[0].node), path(down.node))
        axis = labels.of(down.x)[-1]
        if axis == ():
            missed.append(Unseen(f"feed-forward {place}", down.node.name, "it has a single neuron"))
            continue
        factors = [f for f in flat(axis) if isinstance(f, Atom)]
        if len(factors) != 1 or factors[0].parts is not None:
            reason = f"its {size_of(axis)} neurons are {len(factors)} axes that other parts of the graph tell apart"
            if factors and all(f.parts is None for f in factors):
                missed.append(Unseen(f"feed-forward {place}", down.node.name, reason))
            continue
        up, gate = _up_and_gate(labels, products, activations[0], down)
        found.append(FeedForward(place, up, gate, down, _name(activations[0]), size_of(axis), factors[0]))
    return found, missed


def find_experts(labels: Labels, dense: Collection[FeedForward]) -> tuple[list[Experts], list[Unseen]]:
    """Every bank of experts, and products with banks that are none."""
    found: list[Experts] = []
    missed: list[Unseen] = []
    known: set[fx.Node] = set()
    for down in labels.bank_linears.values():
        joined = _joined(labels, down, labels.bank_linears)
        if joined is None:
            continue
        products, activations = joined
        place = common_path(path(products[0].node), path(down.node))
        known |= {down.node, *(p.node for p in products)}
        axes = labels.weight_axes[down.weight]
        neurons, experts = ([f for f in flat(axes[i]) if isinstance(f, Atom)] for i in (down.in_axis, 0))
        if not experts:
            missed.append(Unseen(f"experts {place}", down.node.name, "it has a single expert"))
            continue
        if len(neurons) != 1 or len(experts) > 2 or any(f.parts is not None for f in (*neurons, *experts)):
            missed.append(Unseen(f"experts {place}", down.node.name, "its neurons or experts are no single axis"))
            continue
        up, gate = _up_and_gate(labels, products, activations[0], down)
        router = _router(labels, experts[-1], down)
        index = chosen(down)
        shared = tuple(f for f in dense if router is not None and _same_source(f.up, router))
        found.append(
            Experts(
                place,
                router,
                up,
                gate,
                down,
                _name(activations[0]),
                size_of(axes[0]),
                experts[-1],
                _top_k(index, down),
                neurons[0].size,
                neurons[0],
                shared,
                experts[0] if len(experts) == 2 else None,
                index,
                *(share(down, index) if index is not None else (None, None)),
            )
        )
    for linear in labels.bank_linears.values():
        if linear.node not in known:
            reason = "a bank of matrices that is no up or down projection of experts"
            missed.append(Unseen(f"bank {path(linear.node)}", linear.node.name, reason))
    return found, missed


def _joined(labels: Labels, down: Linear, among: dict[fx.Node, Linear]) -> tuple[list[Linear], list[fx.Node]] | None:
    """One or two products of one input behind a down projection's input, and the activations in between."""
    between, products = elementwise_sources(labels, down.x)
    activations = [n for n in between if activation(n)] or [n for n in between if spelled(n)]
    if not products or len(products) > 2 or not activations or any(p.node not in among for p in products):
        return None
    inside = any(node in labels.norms or node in labels.filters for node in between)
    if inside and _width(labels, down, down.out_axis) != _width(labels, products[0], products[0].in_axis):
        return None  # A head with a norm of its own or what a state-space mixer selects by returns to no stream.
    sources = {behind(p.x) for p in products}
    return (products, activations) if len(sources) == 1 else None


def _gated_by_tokens(labels: Labels, down: Linear) -> Linear | None:
    """The product whose activation is multiplied by an embedding of the tokens before a down projection."""
    gated = behind(down.x)
    if getattr(gated.target, "overloadpacket", None) is not aten.mul:
        return None
    for factor in gated.args:
        if not isinstance(factor, fx.Node) or not activation(active := behind(factor)):
            continue
        up = labels.linears.get(behind(active.args[0]))  # type: ignore[arg-type]
        if up is not None and any(_embedded(other) for other in gated.args if other is not factor):
            return up
    return None


def _embedded(node: object) -> bool:
    """Whether an embedding of tokens lies behind sums, scales, norms and layouts."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen or current.op != "call_function":
            continue
        seen.add(current)
        packet = getattr(current.target, "overloadpacket", None)
        if packet is aten.embedding:
            return True
        if packet in TRANSPARENT:
            stack.extend(current.all_input_nodes)
    return False


def _width(labels: Labels, linear: Linear, axis: int) -> int:
    return size_of(labels.weight_axes[linear.weight][axis])


def _same_source(one: Linear, other: Linear) -> bool:
    return behind(one.x) is behind(other.x)


def _up_and_gate(labels: Labels, products: list[Linear], active: fx.Node, down: Linear) -> tuple[Linear, Linear | None]:
    gate = gate_of(products, active) if len(products) == 2 else None
    up = next(p for p in products if p is not gate)
    if len(products) == 1 and _width(labels, up, up.out_axis) >= 2 * _width(labels, down, down.in_axis):
        gate = up
    return up, gate


def _name(active: fx.Node) -> str:
    return str(getattr(active.target, "overloadpacket", active.target)).split(".")[-1]


def _router(labels: Labels, expert: Atom, down: Linear) -> Linear | None:
    """The nearest product before the bank whose outputs are numbered as the experts are."""
    before = [linear for linear in labels.linears.values() if linear.node < down.node]
    found = [one for one in before if expert in leaves(labels.weight_axes[one.weight][one.out_axis])]
    return found[-1] if found else None


def _top_k(choices: fx.Node | None, down: Linear) -> int | None:
    """How many experts a tensor of choices names for each token: its last axis, or what chose where it is a list."""
    if choices is not None and choices.meta["val"].dim() > 1:
        return int(choices.meta["val"].shape[-1])
    node = down.index
    while node is not None and node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        if packet is aten.topk:
            return int(node.args[1])  # type: ignore[arg-type]
        if packet in (aten.argmax, aten.argmin):
            return 1
        node = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return None
