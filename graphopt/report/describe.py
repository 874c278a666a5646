"""What a program is, as data: blocks with heads and widths, norms and positions, embedding, head and costs.

Everything is read from the graph and its views; names are only shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.cost import Cost, Part, cost
from graphopt.ir.program import Program
from graphopt.views import Attention, Block, Experts, FeedForward, Linear, Views

aten = torch.ops.aten
NORMS = {
    torch.ops.graphopt.rms_norm: "RMSNorm",
    aten.rms_norm: "RMSNorm",
    aten.layer_norm: "LayerNorm",
    aten.native_layer_norm: "LayerNorm",
}


@dataclass(frozen=True)
class AttentionFacts:
    """One attention; `path` is relative to its block, `biases` names the products that have one."""

    path: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    positions: str
    causal: bool
    window: int | None
    softcap: float | None
    sinks: bool
    qk_norm: bool
    cross: bool
    packed: bool
    biases: tuple[str, ...]


@dataclass(frozen=True)
class FeedForwardFacts:
    """One feed-forward; `path` is relative to its block."""

    path: str
    neurons: int
    activation: str
    gated: bool
    biases: tuple[str, ...]


@dataclass(frozen=True)
class ExpertFacts:
    """One bank of experts; `top_k` is None when every expert sees every token, `shared` counts those all tokens use."""

    path: str
    experts: int
    top_k: int | None
    neurons: int
    activation: str
    gated: bool
    routed: bool
    shared: int


@dataclass(frozen=True)
class MixerFacts:
    """One sub-layer that mixes tokens without attention; `path` is relative to its block."""

    path: str
    kind: str


_PARTS = ("attentions", "feed_forwards", "experts", "mixers")


@dataclass(frozen=True)
class BlockFacts:
    """One block: its views, how its norms and sub-layers stand, and what it costs."""

    path: str
    index: int
    width: int
    layout: tuple[str, ...]
    norm: str
    place: str
    attentions: tuple[AttentionFacts, ...]
    feed_forwards: tuple[FeedForwardFacts, ...]
    experts: tuple[ExpertFacts, ...]
    mixers: tuple[MixerFacts, ...]
    parameters: int
    bytes: int
    flops: sympy.Expr
    kv_bytes: sympy.Expr

    def signature(self) -> tuple[Any, ...]:
        """What must be equal for two blocks to be shown as one."""
        return tuple(
            tuple(replace(part, path=re.sub(r"\d+", "#", part.path)) for part in value) if key in _PARTS else value
            for key, value in vars(self).items()
            if key not in ("path", "index")
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, formulae as text that sympy reads."""
        return {**asdict(self), "flops": str(self.flops), "kv_bytes": str(self.kv_bytes)}


@dataclass(frozen=True)
class Table:
    """An embedding or a head: `rows` x `width`, the weight it reads."""

    path: str
    weight: str
    rows: int
    width: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Description:
    """Everything that `explain` shows of a program."""

    program: Program
    cost: Cost
    blocks: tuple[BlockFacts, ...]
    embedding: Table | None
    positions: Table | None
    head: Table | None
    final_norm: str | None
    unseen: tuple[Mapping[str, str], ...]

    @property
    def tied(self) -> bool:
        """Whether the head reads the embedding's weight."""
        return self.embedding is not None and self.head is not None and self.embedding.weight == self.head.weight

    @property
    def removed(self) -> tuple[Mapping[str, Any], ...]:
        """Blocks (or their sub-layers) that steps of the trail took out."""
        found = []
        for applied in self.program.trail:
            for edit in applied.edits:
                if edit.get("edit") == "skip":
                    step = {"step": applied.step, "place": applied.place}
                    found.append({"path": str(edit["block"]), "parts": list(edit.get("parts") or ()), **step})
        return tuple(found)


def describe(program: Program) -> Description:
    """Describe a program from its graph."""
    views, found = Views(program), cost(program)
    embedding, positions = _embeddings(program)
    return Description(
        program=program,
        cost=found,
        blocks=tuple(
            _block(views, block, part) for block, part in zip(views.blocks, found.breakdown.blocks, strict=True)
        ),
        embedding=embedding,
        positions=positions,
        head=_head(program, views),
        final_norm=_final_norm(program, views),
        unseen=tuple({"what": each.what, "node": each.node, "reason": each.reason} for each in views.unseen),
    )


def _block(views: Views, block: Block, part: Part) -> BlockFacts:
    kinds, places = _norms(views, block)
    return BlockFacts(
        path=block.path,
        index=block.index,
        width=int(block.entry.meta["val"].shape[-1]),
        layout=tuple(sublayer.kind for sublayer in block.sublayers),
        norm=" and ".join(kinds) or "none",
        place=places,
        attentions=tuple(_attention(block, attention) for attention in block.attentions),
        feed_forwards=tuple(_feed_forward(block, found) for found in block.feed_forwards),
        experts=tuple(_experts(block, found) for found in block.experts),
        mixers=tuple(MixerFacts(_relative(mixer.path, block.path), mixer.kind) for mixer in block.mixers),
        parameters=part.parameters,
        bytes=part.bytes,
        flops=part.flops,
        kv_bytes=part.kv_bytes,
    )


def _attention(block: Block, attention: Attention) -> AttentionFacts:
    sides = {"q": attention.q, "k": attention.k, "v": attention.v, "o": attention.o}
    before = _ancestors([attention.core], set(block.nodes))
    own = [node for node in before if _packet(node) in NORMS and _stripped(node.args[0]) is not block.entry]
    projected = {linear.node for linear in (attention.q, attention.k) if linear is not None}
    return AttentionFacts(
        path=_relative(attention.path, block.path),
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        value_dim=attention.value_dim,
        positions=attention.positions,
        causal=attention.causal,
        window=attention.window,
        softcap=attention.core.args[8],  # type: ignore[arg-type]
        sinks=attention.core.args[4] is not None,
        qk_norm=any(_ancestors([node], before) & projected for node in own),
        cross=attention.cross,
        packed=attention.q is not None and attention.q is attention.k is attention.v,
        biases=_biases(sides),
    )


def _feed_forward(block: Block, found: FeedForward) -> FeedForwardFacts:
    return FeedForwardFacts(
        path=_relative(found.path, block.path),
        neurons=found.neurons,
        activation=_activation(found),
        gated=found.gate is not None,
        biases=_biases({"up": found.up, "gate": found.gate, "down": found.down}),
    )


def _experts(block: Block, found: Experts) -> ExpertFacts:
    return ExpertFacts(
        path=_relative(found.path, block.path),
        experts=found.experts,
        top_k=found.top_k,
        neurons=found.neurons,
        activation=_activation(found),
        gated=found.gate is not None,
        routed=found.router is not None,
        shared=len(found.shared),
    )


def _activation(found: FeedForward | Experts) -> str:
    """The name of the activation; a GELU by its tanh formula is told from a plain tanh by its cube."""
    between = _ancestors([found.down.x], None, stop={found.up.node})
    if any(_packet(n) is aten.gelu and n.kwargs.get("approximate") == "tanh" for n in between):
        return "gelu (tanh form)"
    if found.activation == "tanh" and any(_packet(n) is aten.pow and n.args[1] == 3 for n in between):
        return "gelu (tanh form)"
    return found.activation


def _biases(sides: Mapping[str, Linear | None]) -> tuple[str, ...]:
    return tuple(name for name, linear in sides.items() if linear is not None and linear.bias is not None)


def _norms(views: Views, block: Block) -> tuple[list[str], str]:
    """Kinds of the norms of a block over its width, and their place: pre, post, sandwich or none."""
    stream, nodes = {node for points in views.streams for node in points}, set(block.nodes)
    width = block.entry.meta["val"].shape[-1]
    inside_attention = _ancestors([attention.core for attention in block.attentions], nodes)
    kinds: list[str] = []
    places: set[str] = set()
    for node in block.nodes:
        if _packet(node) not in NORMS or node.args[0].meta["val"].shape[-1] != width:  # type: ignore[union-attr]
            continue
        source = _stripped(node.args[0])
        if source in stream:
            places.add("post" if node in stream else "pre")
        elif node in inside_attention:
            continue
        else:
            places.add("branch")
        kinds.append(NORMS[_packet(node)])
    place = "sandwich" if {"pre", "branch"} <= places else "post" if places & {"post", "branch"} else "pre"
    return list(dict.fromkeys(kinds)), place if places else "none"


def _stripped(value: object) -> object:
    """A tensor behind casts and reshapes."""
    while isinstance(value, fx.Node) and _packet(value) in (aten.to, aten.view, aten.reshape, aten.contiguous):
        value = value.args[0]
    return value


def _embeddings(program: Program) -> tuple[Table | None, Table | None]:
    roles = {spec.name: spec.role for spec in program.entry.inputs}
    tokens = positions = None
    for node in program.graph.graph.nodes:
        if _packet(node) is not aten.embedding or "weight" not in node.args[0].meta:
            continue
        sources = {roles.get(n.meta["input"]) for n in _ancestors([node.args[1]], None) if "input" in n.meta}
        rows, width = (int(size) for size in node.args[0].meta["val"].shape)
        table = Table(str(node.meta.get("path", node.name)), node.args[0].meta["weight"], rows, width)
        if "tokens" in sources and tokens is None:
            tokens = table
        elif "tokens" not in sources and positions is None:
            positions = table
    return tokens, positions


def _head(program: Program, views: Views) -> Table | None:
    behind = _ancestors([program.output_nodes[0]], None, stop=set(views.labels.linears))
    found = [views.labels.linears[node] for node in behind if node in views.labels.linears]
    inside = {node for block in views.blocks for node in block.nodes}
    if len(found) != 1 or found[0].node in inside:
        return None
    linear = found[0]
    shape = program.weights[linear.weight].expr.shape
    return Table(
        str(linear.node.meta.get("path", linear.node.name)),
        linear.weight,
        shape[linear.out_axis],
        shape[linear.in_axis],
    )


def _final_norm(program: Program, views: Views) -> str | None:
    last = views.blocks[-1].exit if views.blocks else None
    after = next((points[points.index(last) :] for points in views.streams if last in points), ())
    return next((NORMS[_packet(node)] for node in after[1:] if _packet(node) in NORMS), None)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _ancestors(start: Iterable[object], inside: set[fx.Node] | None, stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """Nodes that the given ones are computed from, themselves included; what lies behind `stop` is left out."""
    found: set[fx.Node] = set()
    stack = [node for node in start if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in found or (inside is not None and node not in inside):
            continue
        found.add(node)
        if stop is None or node not in stop:
            stack.extend(node.all_input_nodes)
    return found


def _relative(path: str, block: str) -> str:
    return path.removeprefix(block + ".") if path != block else ""
