"""Finding attentions: the core ops, the products next to them and what counts their heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.views.atoms import Atom, flat, size_of
from graphopt.views.kinds import Attention
from graphopt.views.labels import Labels
from graphopt.views.trace import (
    consumer_linear,
    mixes_streams,
    path,
    positions,
    source_linear,
    stream_source,
    unrepeated,
)

aten = torch.ops.aten
HELD = (
    torch.ops.graphopt.admitting_attention.default,
    torch.ops.graphopt.held_attention.default,
    torch.ops.graphopt.packed_attention.default,
)
_PRODUCTS = (aten.matmul, aten.bmm, aten.einsum)
_UNCHANGED = (aten.to, aten.view, aten.reshape, aten.clone, aten.masked_fill, aten.slice, aten.mul, aten.transpose)


def attention_cores(program: Program) -> tuple[fx.Node, ...]:
    """The attention ops of a program, in graph order."""
    ops = torch.ops.graphopt
    targets = (
        ops.admitted_attention.default,
        ops.admitting_attention.default,
        ops.attention.default,
        ops.bounded_attention.default,
        ops.cached_attention.default,
        ops.held_attention.default,
        ops.packed_attention.default,
        ops.quantised_attention.default,
    )
    return tuple(node for node in program.graph.graph.nodes if node.target in targets)


def unread_softmaxes(program: Program) -> Iterator[fx.Node]:
    """Softmaxes that weigh activations and are no attention op: attention spelled in a way that is not understood."""
    for node in program.graph.graph.nodes:
        if getattr(node.target, "overloadpacket", None) not in (aten.softmax, aten._softmax):
            continue
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            for user in current.users:
                packet = getattr(user.target, "overloadpacket", None)
                if packet in _PRODUCTS and _weighs(user, current):
                    yield node
                    stack.clear()
                    break
                if packet in _UNCHANGED and user not in seen:
                    seen.add(user)
                    stack.append(user)


def _weighs(product: fx.Node, weights: fx.Node) -> bool:
    """Whether a product is of some weights and another activation, whose rows are no streams side by side."""
    if mixes_streams(product):
        return False
    factors = product.args[1] if product.target is aten.einsum.default else product.args[:2]
    others = [f for f in factors if f is not weights]  # type: ignore[union-attr]
    return bool(others) and all(isinstance(f, fx.Node) and "weight" not in f.meta for f in others)


def find_attentions(
    labels: Labels, cores: tuple[fx.Node, ...], regions: Mapping[fx.Node, set[fx.Node]]
) -> tuple[Attention, ...]:
    """A view of every attention; `regions` are the sub-layers that hold them, which tell self from cross attention."""
    found = []
    for node in cores:
        cached = node.target is torch.ops.graphopt.cached_attention.default
        held = node.target in HELD
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        aq, ak, av = labels.of(q), labels.of(k), labels.of(v)
        sources = [source_linear(labels, side) for side in (q, k, v)]
        kv_axis = unrepeated(labels, ak[1], sources[1])
        kv_factors = [f for f in flat(kv_axis) if isinstance(f, Atom) and f.parts is None]
        q_factors = [f for f in flat(aq[1]) if isinstance(f, Atom) and f.parts is None]
        kv_group = kv_factors[0] if len(kv_factors) == 1 else None
        inner = [f for f in q_factors if f is not kv_group]
        region = regions.get(node)
        cross = k not in region if region is not None and q in region else stream_source(q) is not stream_source(k)
        found.append(
            Attention(
                path=path(node),
                core=node,
                q=sources[0],
                k=sources[1],
                v=sources[2],
                o=consumer_linear(labels, node),
                heads=size_of(aq[1]),
                kv_heads=size_of(kv_axis),
                head_dim=size_of(aq[3]),
                value_dim=size_of(av[3]),
                causal=cached or held or bool(node.args[6]),
                window=None if held else node.args[11 if cached else 7],  # type: ignore[arg-type]
                positions=_positions(node, q, cached),
                kv_group=kv_group,
                query_group=inner[0] if len(inner) == 1 else None,
                output=(*aq[1], *av[3]),
                cross=cross,
            )
        )
    return tuple(found)


def _positions(core: fx.Node, q: fx.Node, cached: bool) -> str:
    """How positions enter: `rotary`, `bias` (numbers that each head adds to its scores, as ALiBi does) or `none`."""
    mask = core.args[8 if cached else 3]
    if positions(q) == "none" and isinstance(mask, fx.Node):
        value = mask.meta["val"]
        if (
            value.dtype.is_floating_point
            and value.dim() == 4
            and not (isinstance(value.shape[1], int) and value.shape[1] == 1)
        ):
            return "bias"
    return positions(q)
