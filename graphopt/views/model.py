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
from graphopt.views.atoms import Atom, Axis, flat, leaves, size_of
from graphopt.views.labels import Labels, Linear
from graphopt.views.trace import (
    activation,
    between,
    common_path,
    consumer_linear,
    derives_from,
    elementwise_sources,
    gate_of,
    path,
    piece_users,
    positions,
    reachable,
    same_shape,
    source_linear,
    stream_source,
    unrepeated,
)

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
            if node.target not in (torch.ops.graphopt.attention.default, torch.ops.graphopt.cached_attention.default):
                continue
            cached = node.target is torch.ops.graphopt.cached_attention.default
            q, k, v = node.args[:3]
            aq, ak, av = labels.of(q), labels.of(k), labels.of(v)
            sources = [source_linear(labels, side) for side in (q, k, v)]
            consumer = consumer_linear(labels, node)
            kv_axis = unrepeated(labels, ak[1], sources[1])
            kv_factors = [f for f in flat(kv_axis) if isinstance(f, Atom) and f.parts is None]
            q_factors = [f for f in flat(aq[1]) if isinstance(f, Atom) and f.parts is None]
            kv_group = kv_factors[0] if len(kv_factors) == 1 else None
            inner = [f for f in q_factors if f is not kv_group]
            found.append(
                Attention(
                    path=path(node),
                    core=node,
                    q=sources[0],
                    k=sources[1],
                    v=sources[2],
                    o=consumer,
                    heads=size_of(aq[1]),
                    kv_heads=size_of(kv_axis),
                    head_dim=size_of(aq[3]),
                    value_dim=size_of(av[3]),
                    causal=cached or bool(node.args[6]),
                    window=node.args[11 if cached else 7],
                    positions=positions(q),
                    kv_group=kv_group,
                    query_group=inner[0] if len(inner) == 1 else None,
                    output=(*aq[1], *av[3]),
                    cross=stream_source(q) is not stream_source(k),
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
            between, products = elementwise_sources(labels, down.x)
            if not products or len(products) > 2 or any(p.node in cores for p in products):
                continue
            activations = [n for n in between if activation(n)]
            if not activations:
                continue
            axis = labels.of(down.x)[-1]
            factors = [f for f in flat(axis) if isinstance(f, Atom)]
            if len(factors) != 1 or factors[0].parts is not None:
                continue
            if len({p.x for p in products}) != 1:
                continue
            gate = gate_of(products, activations[0]) if len(products) == 2 else None
            up = next(p for p in products if p is not gate)
            if len(products) == 1 and len(piece_users(labels, products[0], down)) > 1:
                gate = products[0]
            name = str(getattr(activations[0].target, "overloadpacket", activations[0].target)).split(".")[-1]
            found.append(
                FeedForward(
                    common_path(path(up.node), path(down.node)), up, gate, down, name, size_of(axis), factors[0]
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
        forward = reachable([start], lambda n: n.users)
        both = {n for n in reachable([result], lambda n: n.all_input_nodes) if n in forward}
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
            if node.target is aten.embedding.default and derives_from(node.args[1], tokens):
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
            inside = between(entry, exit)
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
        residual = [s for s in self.sublayers if same_shape(s.entry, s.exit)]
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
            path = common_path(*paths) if len(paths) > 1 else paths[0].rpartition(".")[0]
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
