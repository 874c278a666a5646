"""Typed views of a program: blocks, attentions, feed-forwards and norms, found from the graph alone.

The residual stream gives the blocks: a node through which every path from the embedding to the result passes is a point
of the stream, and what lies between two points is a sub-layer. Module paths are shown to people and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.views.atoms import Atom, Axis, find, flat, leaves, size_of
from graphopt.views.labels import Labels, Linear

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: its core node, projections and head algebra.

    `q`, `k`, `v`, `o` are the matrix products next to the core (None when a side is not one); `kv_group` is the leaf that
    counts KV heads and `query_group` the leaf that counts query heads in each (None when there is 1).
    """

    path: str
    core: fx.Node
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None
    positions: str
    kv_group: Atom | None
    query_group: Atom | None
    output: Axis
    cross: bool = False


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward: up (and gate) into `neurons`, an activation, down."""

    path: str
    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    neurons: int
    neuron: Atom


@dataclass(frozen=True, eq=False)
class SubLayer:
    """What lies between two points of the residual stream: `exit` depends on `entry` and nothing else between."""

    kind: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """One layer: consecutive sub-layers, the attentions and feed-forwards in them."""

    index: int
    path: str
    sublayers: tuple[SubLayer, ...]
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]

    @property
    def entry(self) -> fx.Node:
        """The stream before the block."""
        return self.sublayers[0].entry

    @property
    def exit(self) -> fx.Node:
        """The stream after the block."""
        return self.sublayers[-1].exit

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the block."""
        return tuple(node for sublayer in self.sublayers for node in sublayer.nodes)


@dataclass(frozen=True)
class Unseen:
    """Something that looks like a part but could not be viewed, and why."""

    what: str
    node: str
    reason: str


class Views:
    """All views of one program, computed on demand."""

    def __init__(self, program: Program) -> None:
        self.program = program

    @cached_property
    def labels(self) -> Labels:
        """Dimension labels of all nodes."""
        return Labels(self.program)

    @cached_property
    def unseen(self) -> tuple[Unseen, ...]:
        """Reasoned declines: attentions and products that no view covers."""
        found = []
        for attention in self.attentions:
            for side in ("q", "k", "v", "o"):
                if getattr(attention, side) is None:
                    found.append(
                        Unseen(f"attention {attention.path}", attention.core.name, f"{side} is no plain projection")
                    )
            if attention.kv_group is None and attention.kv_heads > 1:
                found.append(Unseen(f"attention {attention.path}", attention.core.name, "KV heads have no free axis"))
        if not self.blocks:
            found.append(Unseen("blocks", "", "no repeated residual structure was found"))
        return tuple(found)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every attention core, in graph order."""
        labels = self.labels
        found = []
        for node in self.program.graph.graph.nodes:
            if node.target is not torch.ops.graphopt.attention.default:
                continue
            q, k, v = node.args[:3]
            aq, ak, av = labels.of(q), labels.of(k), labels.of(v)
            sources = [_source_linear(labels, side) for side in (q, k, v)]
            consumer = _consumer_linear(labels, node)
            kv_axis = _unrepeated(labels, ak[1], sources[1])
            kv_factors = [f for f in flat(kv_axis) if isinstance(f, Atom) and f.parts is None]
            q_factors = [f for f in flat(aq[1]) if isinstance(f, Atom) and f.parts is None]
            kv_group = kv_factors[0] if len(kv_factors) == 1 else None
            inner = [f for f in q_factors if f is not kv_group]
            found.append(
                Attention(
                    path=_path(node),
                    core=node,
                    q=sources[0],
                    k=sources[1],
                    v=sources[2],
                    o=consumer,
                    heads=size_of(aq[1]),
                    kv_heads=size_of(kv_axis),
                    head_dim=size_of(aq[3]),
                    value_dim=size_of(av[3]),
                    causal=bool(node.args[6]),
                    window=node.args[7],
                    positions=_positions(q),
                    kv_group=kv_group,
                    query_group=inner[0] if len(inner) == 1 else None,
                    output=(*aq[1], *av[3]),
                    cross=_stream_source(q) is not _stream_source(k),
                )
            )
        return tuple(found)

    @cached_property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """Every pair (or gated triple) of products joined by an elementwise activation."""
        labels = self.labels
        found = []
        cores = {a.core for a in self.attentions}
        for down in labels.linears.values():
            between, products = _elementwise_sources(labels, down.x)
            if not products or len(products) > 2 or any(p.node in cores for p in products):
                continue
            activations = [n for n in between if _activation(n)]
            if not activations:
                continue
            axis = labels.of(down.x)[-1]
            factors = [f for f in flat(axis) if isinstance(f, Atom)]
            if len(factors) != 1 or factors[0].parts is not None:
                continue
            if len({p.x for p in products}) != 1:
                continue
            gate = _gate(products, activations[0]) if len(products) == 2 else None
            up = next(p for p in products if p is not gate)
            if len(products) == 1 and len(_piece_users(labels, products[0], down)) > 1:
                gate = products[0]
            name = str(getattr(activations[0].target, "overloadpacket", activations[0].target)).split(".")[-1]
            found.append(
                FeedForward(
                    _common_path(_path(up.node), _path(down.node)), up, gate, down, name, size_of(axis), factors[0]
                )
            )
        return tuple(found)

    @cached_property
    def stream(self) -> tuple[fx.Node, ...]:
        """Points of the residual stream: nodes on every path from the token embedding to the first result."""
        start = self._stream_start()
        if start is None:
            return ()
        result = self.program.output_nodes[0]
        forward = _reachable([start], lambda n: n.users)
        both = {n for n in _reachable([result], lambda n: n.all_input_nodes) if n in forward}
        if result not in both:
            return ()
        graph: nx.DiGraph[fx.Node] = nx.DiGraph()
        for node in both:
            for user in node.users:
                if user in both:
                    graph.add_edge(user, node)
        if start is result:
            return (start,)
        dominators = nx.immediate_dominators(graph, result)
        # Walking dominators of the reversed graph from the start lists the points in stream order.
        points, node = [start], start
        while node is not result:
            node = dominators[node]
            points.append(node)
        return tuple(points)

    def _stream_start(self) -> fx.Node | None:
        tokens = {spec.name for spec in self.program.entry.inputs if spec.role in ("tokens", "values")}
        embeddings = []
        for node in self.program.graph.graph.nodes:
            if node.target is aten.embedding.default and _derives_from(node.args[1], tokens):
                embeddings.append(node)
        if embeddings:
            return embeddings[0]
        floats = [
            node
            for node in self.program.graph.graph.nodes
            if node.meta.get("input") in tokens and node.meta["val"].dtype.is_floating_point
        ]
        return floats[0] if floats else None

    @cached_property
    def hidden(self) -> Axis:
        """The axis of the residual stream's width."""
        return self.labels.of(self.blocks[0].entry)[-1] if self.blocks else ()

    @cached_property
    def sublayers(self) -> tuple[SubLayer, ...]:
        """Regions between consecutive stream points that add something to the stream (or re-normalise it)."""
        cores = {a.core: a for a in self.attentions}
        downs = {f.down.node: f for f in self.feed_forwards}
        points = self.stream
        order = {node: i for i, node in enumerate(self.program.graph.graph.nodes)}
        found = []
        for entry, exit in pairwise(points):
            inside = _between(entry, exit)
            has_attention = any(node in cores for node in inside)
            has_ffn = any(node in downs for node in inside)
            kind = {
                (True, True): "parallel",
                (True, False): "attention",
                (False, True): "feed_forward",
                (False, False): "other",
            }[has_attention, has_ffn]
            found.append(SubLayer(kind, entry, exit, tuple(sorted(inside, key=order.__getitem__))))
        return tuple(found)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Layers in stream order: each begins at a sub-layer with attention that adds to the stream."""
        residual = [s for s in self.sublayers if _same_shape(s.entry, s.exit)]
        starts = [i for i, s in enumerate(residual) if s.kind in ("attention", "parallel") and _is_residual(s)]
        blocks = []
        for number, start in enumerate(starts):
            stop = starts[number + 1] if number + 1 < len(starts) else None
            members = residual[start:stop] if stop is not None else _last_members(residual, starts)
            # A norm before the attention of the next block (post-norm layouts keep it after their own add) stays with
            # the sub-layer it follows; the final norm of the model is no part of the last block.
            nodes = {node for member in members for node in member.nodes}
            attentions = tuple(a for a in self.attentions if a.core in nodes)
            feed_forwards = tuple(f for f in self.feed_forwards if f.down.node in nodes)
            paths = [a.path for a in attentions] + [f.path for f in feed_forwards]
            path = _common_path(*paths) if len(paths) > 1 else paths[0].rpartition(".")[0]
            blocks.append(Block(number, path, tuple(members), attentions, feed_forwards))
        return tuple(blocks)

    def block_of(self, node: fx.Node) -> Block | None:
        """The block that holds a node."""
        return next((block for block in self.blocks if node in block.nodes), None)

    def producers(self, leaf: Atom) -> Iterator[Linear]:
        """Products whose output axis holds the leaf."""
        for linear in self.labels.linears.values():
            if leaf in leaves(self.labels.weight_axes[linear.weight][linear.out_axis]):
                yield linear

    def consumers(self, leaf: Atom) -> Iterator[Linear]:
        """Products that contract over the leaf."""
        for linear in self.labels.linears.values():
            if leaf in leaves(self.labels.weight_axes[linear.weight][linear.in_axis]):
                yield linear


def _last_members(residual: list[SubLayer], starts: list[int]) -> list[SubLayer]:
    start = starts[-1]
    if len(starts) > 1:
        pattern = [s.kind for s in residual[starts[-2] : start]]
        return residual[start : start + len(pattern)]
    end = start + 1
    while end < len(residual) and residual[end].kind in ("feed_forward", "parallel"):
        end += 1
    return residual[start:end]


def _is_residual(sublayer: SubLayer) -> bool:
    return sublayer.entry in sublayer.exit.all_input_nodes or any(
        sublayer.entry in node.all_input_nodes for node in sublayer.nodes if node.target is aten.add.Tensor
    )


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape


def _reachable(start: list[fx.Node], step: object) -> set[fx.Node]:
    seen, stack = set(start), list(start)
    while stack:
        for other in step(stack.pop()):  # type: ignore[operator]
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen


def _between(entry: fx.Node, exit: fx.Node) -> set[fx.Node]:
    """Nodes on paths from entry (excluded) to exit (included)."""
    back, stack = {exit}, [exit]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not entry and source not in back:
                back.add(source)
                stack.append(source)
    ahead, stack = set(), [entry]
    while stack:
        for user in stack.pop().users:
            if user in back and user not in ahead:
                ahead.add(user)
                stack.append(user)
    return ahead


_TRANSPARENT = {
    aten.view,
    aten.reshape,
    aten.transpose,
    aten.permute,
    aten.contiguous,
    aten.clone,
    aten.unsqueeze,
    aten.squeeze,
    aten.flatten,
    aten.unflatten,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unbind,
    aten.slice,
    aten.select,
    aten.to,
    aten._unsafe_view,
    torch.ops.graphopt.rotary,
    torch.ops.graphopt.rms_norm,
    aten.layer_norm,
    aten.add,
    aten.mul,
    aten.neg,
    aten.cat,
    aten.expand,
    aten.stack,
}


def _source_linear(labels: Labels, node: fx.Node) -> Linear | None:
    """The one product that an attention input comes from, through layout changes, norms and rotary embedding."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current in labels.linears:
            found.add(current)
            continue
        packet = getattr(current.target, "overloadpacket", None)
        if packet in _TRANSPARENT or getattr(current.target, "__name__", "") == "getitem":
            if packet is torch.ops.graphopt.rotary:
                stack.append(current.args[0])  # type: ignore[arg-type]
            else:
                stack.extend(
                    n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)
                )
    return labels.linears[next(iter(found))] if len(found) == 1 else None


def _unrepeated(labels: Labels, axis: Axis, k: Linear | None) -> Axis:
    """The head axis of the keys without the factors that only repeat KV heads: those run through no key weight."""
    if k is None:
        return axis
    own = set(leaves(labels.weight_axes[k.weight][k.out_axis]))
    factors = flat(axis)
    held = [f for f in factors if isinstance(f, Atom) and (f.parts is not None or f in own)]
    return tuple(held) if 0 < len(held) < len(factors) else axis


def _consumer_linear(labels: Labels, node: fx.Node) -> Linear | None:
    """The one product that reads an attention's output through layout changes."""
    stack, found = [node], []
    seen: set[fx.Node] = set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in labels.linears:
                found.append(labels.linears[user])
            elif getattr(user.target, "overloadpacket", None) in _TRANSPARENT:
                stack.append(user)
    return found[0] if len(found) == 1 else None


def _elementwise_sources(labels: Labels, node: fx.Node) -> tuple[list[fx.Node], list[Linear]]:
    """Pointwise nodes and the products behind an activation, going back from a down projection's input."""
    between: list[fx.Node] = []
    products: list[Linear] = []
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function" or isinstance(current.meta["val"], int | torch.SymInt):
            continue
        seen.add(current)
        if current in labels.linears:
            products.append(labels.linears[current])
            continue
        packet = getattr(current.target, "overloadpacket", None)
        pointwise = torch.Tag.pointwise in getattr(current.target, "tags", ())
        if (
            pointwise
            or _activation(current)
            or packet in _LAYOUT
            or getattr(current.target, "__name__", "") == "getitem"
        ):
            between.append(current)
            stack.extend(current.all_input_nodes)
        else:
            return between, []
    return between, products


_LAYOUT = {
    aten.view,
    aten.reshape,
    aten._unsafe_view,
    aten.contiguous,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.slice,
    aten.to,
    aten.clone,
}
_ACTIVATIONS = {
    aten.silu,
    aten.gelu,
    aten.relu,
    aten.tanh,
    aten.sigmoid,
    aten.relu6,
    aten.mish,
    aten.leaky_relu,
    aten.hardswish,
    aten.elu,
    aten.softplus,
    aten.erf,
}


def _activation(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _ACTIVATIONS


def _gate(products: list[Linear], activation: fx.Node) -> Linear:
    """Of two products the one that goes through the activation."""
    behind = _reachable([activation], lambda n: n.all_input_nodes if n.op == "call_function" else ())
    return next((p for p in products if p.node in behind), products[0])


def _piece_users(labels: Labels, product: Linear, down: Linear) -> list[Axis]:
    """Pieces of a packed gate-and-up projection: more than one when its output is split before the activation."""
    axis = labels.of(product.node)[-1]
    factors = flat(axis)
    if len(factors) == 1 and isinstance(factors[0], Atom) and factors[0].parts is not None:
        return list(factors[0].parts.axes)
    return [axis]


def _positions(q: fx.Node) -> str:
    stack, seen = [q], set()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet is torch.ops.graphopt.rotary:
            return "rotary"
        if packet in (aten.linear, aten.addmm, aten.matmul, aten.mm):
            continue
        if packet in (aten.cos, aten.sin, torch.ops.aten.complex, aten.view_as_complex):
            return "rotary"
        stack.extend(node.all_input_nodes)
    return "none"


def _stream_source(node: fx.Node) -> fx.Node | None:
    """The tensor that a projection reads, to tell self from cross attention."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        packet = getattr(current.target, "overloadpacket", None)
        if packet in (aten.linear, aten.addmm):
            return current.args[1 if packet is aten.addmm else 0]  # type: ignore[return-value]
        stack.extend(n for n in current.all_input_nodes[:1])
    return None


def _derives_from(node: object, names: set[str]) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if current.meta.get("input") in names:
            return True
        stack.extend(current.all_input_nodes)
    return False


def _path(node: fx.Node) -> str:
    return str(node.meta.get("path", node.name))


def _common_path(*paths: str) -> str:
    parts = [path.split(".") for path in paths]
    common = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common) or paths[0]


def root(atom: Atom) -> Atom:
    """The representative of an atom, for use as a key."""
    return find(atom)
