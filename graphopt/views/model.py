"""Typed views of a program: blocks, attentions, feed-forwards, expert banks and mixers, found from the graph alone.

The residual streams give the blocks: a node through which every path from an embedding to the result passes is a point
of a stream, and what lies between two points is a sub-layer. An encoder and a decoder are two streams. Module paths are
shown to people and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import fx

from graphopt.ir.program import Program
from graphopt.views.atoms import Atom, Axis, leaves
from graphopt.views.attention import attention_cores, find_attentions, unread_softmaxes
from graphopt.views.feed_forward import find_experts, find_feed_forwards
from graphopt.views.kinds import Attention, Block, Experts, FeedForward, Mixer, SubLayer, Unseen
from graphopt.views.labels import Labels
from graphopt.views.missed import missed_attentions, missed_feed_forwards, outside_blocks
from graphopt.views.routing import Linear
from graphopt.views.stream import Parts, layers, mixing, parted, starts, stream, sublayers
from graphopt.views.trace import between, common_path, path


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
        """Reasoned declines: parts that no view covers, and parts that a view covers in part."""
        found = []
        for attention in self.attentions:
            for side in ("q", "k", "v", "o"):
                if getattr(attention, side) is None:
                    found.append(
                        Unseen(f"attention {attention.path}", attention.core.name, f"{side} is no plain projection")
                    )
            if attention.kv_group is None and attention.kv_heads > 1:
                found.append(Unseen(f"attention {attention.path}", attention.core.name, "KV heads have no free axis"))
        for node in unread_softmaxes(self.program):
            reason = "its softmax weighs values in a way that is no plain attention; it is left alone"
            found.append(Unseen(f"attention {path(node)}", node.name, reason))
        found += self._found_feed_forwards[1]
        found += self._found_experts[1]
        found += missed_attentions(self.program, {one.node for one in found})
        downs = {feed_forward.down.node.name for feed_forward in self.feed_forwards}
        found += missed_feed_forwards(self.labels, downs | {one.node for one in found})
        if self.blocks:
            found += outside_blocks(self.labels, self.blocks, self.attentions, self.feed_forwards, self.experts)
        else:
            found.append(Unseen("blocks", "", "no repeated residual structure was found"))
        return tuple(found)

    @cached_property
    def _cores(self) -> tuple[fx.Node, ...]:
        return attention_cores(self.program)

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Every attention core, in graph order."""
        regions = {
            core: set(sublayer.nodes)
            for _, stack in self._stacks
            for sublayer in stack
            if sublayer.residual
            for core in self._cores
            if core in sublayer.nodes
        }
        return find_attentions(self.labels, self._cores, regions)

    @cached_property
    def _found_feed_forwards(self) -> tuple[list[FeedForward], list[Unseen]]:
        return find_feed_forwards(self.labels, self._cores)

    @cached_property
    def _found_experts(self) -> tuple[list[Experts], list[Unseen]]:
        return find_experts(self.labels, self.feed_forwards)

    @cached_property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """Every pair (or gated triple) of products joined by an elementwise activation."""
        return tuple(self._found_feed_forwards[0])

    @cached_property
    def experts(self) -> tuple[Experts, ...]:
        """Every bank of experts."""
        return tuple(self._found_experts[0])

    @cached_property
    def mixers(self) -> tuple[Mixer, ...]:
        """Sub-layers that mix tokens without a softmax attention."""
        return tuple(mixer for block in self.blocks for mixer in block.mixers)

    def candidate(self, part: Attention | Experts) -> str:
        """A part's name in plans: its path, and where its module runs again outside the layers, that as well."""
        within: list[Attention | Experts] = [a for block in self.blocks for a in block.attentions]
        within += [bank for block in self.blocks for bank in block.experts]
        again = part not in within and any(one.path == part.path for one in within)
        return f"{part.path}:outside the layers" if again else part.path

    @cached_property
    def streams(self) -> tuple[tuple[fx.Node, ...], ...]:
        """Points of each residual stream that holds layers, one stream a stack: encoder, decoder."""
        return tuple(points for points, _ in self._stacks)

    @cached_property
    def stream(self) -> tuple[fx.Node, ...]:
        """Points of the last residual stream, which ends in the result: nodes on every path from its embedding to there."""
        return self.streams[-1] if self.streams else ()

    @cached_property
    def _stacks(self) -> tuple[tuple[tuple[fx.Node, ...], tuple[SubLayer, ...]], ...]:
        """Points and sub-layers of each stream; streams that hold no part which another one does not are left out."""
        order = {node: i for i, node in enumerate(self.program.graph.graph.nodes)}
        found: list[tuple[tuple[fx.Node, ...], tuple[SubLayer, ...], set[fx.Node]]] = []
        for start in starts(self.program):
            if any(start in points for points, _, _ in found):
                continue
            points, inside = stream(self.program, start)
            regions = sublayers(points, inside, order, self._parts)
            parts = {
                s.exit for s in regions if s.residual and s.kind in ("attention", "parallel", "mixer", "feed_forward")
            }
            if points and (parts or not found):
                found.append((points, regions, parts))
        # A stream whose layers all lie on a longer one is a side entrance: type and position embeddings.
        kept = [
            one
            for i, one in enumerate(found)
            if not any(one[2] < other[2] or (one[2] == other[2] and j < i) for j, other in enumerate(found) if j != i)
        ]
        kept.sort(key=lambda one: order[one[0][0]] if not one[2] else min(order[node] for node in one[2]))
        return tuple((points, regions) for points, regions, _ in kept)

    @cached_property
    def _parts(self) -> Parts:
        downs = {f.down.node for f in self.feed_forwards} | {e.down.node for e in self.experts}
        within = {node for f in self.feed_forwards for node in between(f.up.node, f.down.node)}
        return Parts(set(self._cores), downs, within, set(unread_softmaxes(self.program)))

    @cached_property
    def _sublayers(self) -> tuple[tuple[SubLayer, ...], ...]:
        """Sub-layers of each stack; where no stack tells several parts apart, those of the chain that they lie on."""
        named = self._parts.cores | self._parts.downs
        held = [named & set(s.nodes) for _, regions in self._stacks for s in regions if s.residual]
        apart = {node for parts in held if len(parts) == 1 for node in parts}
        return tuple(
            tuple(
                piece
                for region in regions
                for piece in (
                    parted(region, self._parts) if region.residual or named & set(region.nodes) - apart else (region,)
                )
            )
            for _, regions in self._stacks
        )

    @cached_property
    def sublayers(self) -> tuple[SubLayer, ...]:
        """Regions between consecutive stream points, stack by stack."""
        return tuple(sublayer for stack in self._sublayers for sublayer in stack)

    @cached_property
    def hidden(self) -> Axis:
        """The axis of the residual stream's width, of the first stack where there are several."""
        return self.labels.of(self.blocks[0].entry)[-1] if self.blocks else ()

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Layers in stream order, stack after stack."""
        stacks: list[list[list[SubLayer]]] = []
        taken: set[fx.Node] = set()
        # A stream ends in the result, and so passes the last layers of the stacks behind its own: those take them first.
        for regions in reversed(self._sublayers):
            held = {s: [a for a in self.attentions if a.core in s.nodes] for s in regions if s.kind == "attention"}
            crosses = {s for s, inside in held.items() if inside and all(a.cross for a in inside)}
            cut = [m for m in layers(regions, crosses) if not any(node in taken for s in m for node in s.nodes)]
            taken.update(node for members in cut for s in members for node in s.nodes)
            stacks.insert(0, cut)
        numbered = [(number, members) for number, cut in enumerate(stacks) for members in cut]
        return tuple(self._block(index, number, members) for index, (number, members) in enumerate(numbered))

    def _block(self, index: int, stack: int, members: list[SubLayer]) -> Block:
        nodes = {node for member in members for node in member.nodes}
        attentions = tuple(a for a in self.attentions if a.core in nodes)
        feed_forwards = tuple(f for f in self.feed_forwards if f.down.node in nodes)
        experts = tuple(e for e in self.experts if e.down.node in nodes)
        mixers = tuple(_mixer(member, self._parts) for member in members if member.kind == "mixer")
        paths = [a.path for a in attentions] + [f.path for f in feed_forwards]
        paths += [e.path for e in experts] + [m.path for m in mixers]
        place = common_path(*paths) if len(paths) > 1 else paths[0].rpartition(".")[0]
        return Block(index, place, tuple(members), attentions, feed_forwards, experts, mixers, stack)

    def block_of(self, node: fx.Node) -> Block | None:
        """The block that holds a node."""
        return next((block for block in self.blocks if node in block.nodes), None)

    def producers(self, leaf: Atom) -> Iterator[Linear]:
        """Products whose output axis holds the leaf."""
        for linear in self._products():
            if leaf in leaves(self.labels.weight_axes[linear.weight][linear.out_axis]):
                yield linear

    def consumers(self, leaf: Atom) -> Iterator[Linear]:
        """Products that contract over the leaf."""
        for linear in self._products():
            if leaf in leaves(self.labels.weight_axes[linear.weight][linear.in_axis]):
                yield linear

    def _products(self) -> Iterator[Linear]:
        yield from self.labels.linears.values()
        yield from self.labels.bank_linears.values()


def _mixer(member: SubLayer, parts: Parts) -> Mixer:
    inner = [path(node) for node in member.nodes if node is not member.exit]
    kind = mixing(member.entry, set(member.nodes) - parts.within, parts.softmaxes)
    return Mixer(common_path(*inner) if inner else path(member.exit), kind or "projection", member.nodes)
