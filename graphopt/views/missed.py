"""What looks like a part and is in no view, and the reason: found by rules wider than those that find the parts."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.views.atoms import size_of
from graphopt.views.kinds import Attention, Block, Experts, FeedForward, Unseen
from graphopt.views.labels import Labels
from graphopt.views.routing import Linear, behind
from graphopt.views.sizes import op_name
from graphopt.views.trace import LAYOUT, activation, common_path, derives_from, path, spelled

aten = torch.ops.aten
# Operations that join entries of one tensor, as a norm over its neurons or over places does.
_REDUCTIONS = (
    aten.linalg_vector_norm,
    aten.norm,
    aten.mean,
    aten.sum,
    aten.amax,
    aten.var,
    aten.std,
    aten.var_mean,
)


_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm, aten.einsum)


def missed_attentions(program: Program, known: Collection[str]) -> Iterator[Unseen]:
    """Softmaxes of products of two values that both depend on the inputs; those that are `known` are left out."""
    given = {spec.name for spec in program.entry.inputs}
    for node in program.graph.graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in (aten.softmax, aten._softmax) or node.name in known:
            continue
        stack, seen = [node.args[0]], set[fx.Node]()
        while stack:
            current = stack.pop()
            if not isinstance(current, fx.Node) or current in seen:
                continue
            seen.add(current)
            packet = getattr(current.target, "overloadpacket", None)
            if packet in _PRODUCTS:
                if sum(derives_from(factor, given) for factor in current.all_input_nodes) > 1:
                    reason = "its softmax of products of two values is no plain attention; it is left alone"
                    yield Unseen(f"attention {path(node)}", node.name, reason)
                    break
            elif torch.Tag.pointwise in getattr(current.target, "tags", ()) or packet in LAYOUT:
                stack.extend(current.all_input_nodes)


def missed_feed_forwards(labels: Labels, known: Collection[str]) -> Iterator[Unseen]:
    """Products chained by an activation that return to the width they began with and are in no view.

    `known` names the down projections that a view holds or that were declined already.
    """
    for down in labels.linears.values():
        if down.node.name in known:
            continue
        region, products = _chained(labels, down)
        width = _width(labels, down, down.out_axis)
        ups = [p for p in products if _width(labels, p, p.in_axis) == width]
        if not ups or not any(activation(node) or spelled(node) for node in region):
            continue
        place = common_path(*(path(up.node) for up in ups), path(down.node))
        yield Unseen(f"feed-forward {place}", down.node.name, f"{_reason(region, products)}; it is left alone")


def outside_blocks(
    labels: Labels,
    blocks: Collection[Block],
    attentions: Collection[Attention],
    feed_forwards: Collection[FeedForward],
    experts: Collection[Experts],
) -> Iterator[Unseen]:
    """Parts that were found and that no layer holds; a feed-forward that ends in another width is a head, and no part."""
    held = {node for block in blocks for node in block.nodes}
    parts = [("attention", a.path, a.core) for a in attentions]
    parts += [
        ("feed-forward", f.path, f.down.node)
        for f in feed_forwards
        if _width(labels, f.up, f.up.in_axis) == _width(labels, f.down, f.down.out_axis)
    ]
    parts += [("experts", e.path, e.down.node) for e in experts]
    for kind, place, node in parts:
        if node not in held:
            # Named a block and not the part, which has a view: passes that read it decline it, or not, for themselves.
            yield Unseen(f"block {place}", node.name, f"{kind} in no layer of a stream to the first result")


def _chained(labels: Labels, down: Linear) -> tuple[list[fx.Node], list[Linear]]:
    """What lies between a product and the products behind it; nothing where tokens are mixed on the way."""
    region: list[fx.Node] = []
    products: list[Linear] = []
    stack, seen = [down.x], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function" or not isinstance(node.meta["val"], torch.Tensor | tuple | list):
            continue
        seen.add(node)
        if node in labels.linears:
            products.append(labels.linears[node])
            continue
        if not _elementwise(labels, node) and getattr(node.target, "overloadpacket", None) not in _REDUCTIONS:
            return [], []
        region.append(node)
        stack.extend(node.all_input_nodes)
    return region, products


def _elementwise(labels: Labels, node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return (
        torch.Tag.pointwise in getattr(node.target, "tags", ())
        or packet in LAYOUT
        or getattr(node.target, "__name__", "") == "getitem"
        or node in labels.filters
        or activation(node)
        or spelled(node)
    )


def _reason(region: Collection[fx.Node], products: Collection[Linear]) -> str:
    joining = [node for node in region if getattr(node.target, "overloadpacket", None) in _REDUCTIONS]
    if joining:
        return f"{op_name(joining[-1])} joins values between its activation and its products"
    if len({behind(product.x) for product in products}) > 1:
        return f"its neurons are made by {len(products)} products that read different values"
    if len(products) > 2:
        return f"its neurons are made by {len(products)} products"
    return "its neurons are no axis of their own"


def _width(labels: Labels, linear: Linear, axis: int) -> int:
    return size_of(labels.weight_axes[linear.weight][axis])
