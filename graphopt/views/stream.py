"""Residual streams: the points that every path from an embedding to the result passes, and the layers between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.views.chain import chain, shares
from graphopt.views.kinds import SubLayer
from graphopt.views.trace import derives_from, mixes_streams, reachable, same_shape

aten = torch.ops.aten

_RESIDUAL = {
    aten.add,
    aten.sub,
    aten.mul,
    aten.div,
    aten.to,
    aten.contiguous,
    aten.clone,
    aten.layer_norm,
    aten.permute,
    aten.transpose,
    aten.view,
    aten.reshape,
    torch.ops.graphopt.rms_norm,
}
_SHAPED = {
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}
_CHOICES = (torch.ops.graphopt.admit_tokens.default, torch.ops.graphopt.top_tokens.default)
_CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.convolution}
_RECURRENCES = {aten.cumsum, aten.cumprod, aten.tril, aten.triu, aten.einsum, aten.bmm, aten.matmul, aten.logcumsumexp}


def starts(program: Program) -> tuple[fx.Node, ...]:
    """Where residual streams may begin: embeddings of tokens, in graph order, inputs of numbers, then their first products.

    A model that scales its input and undoes it at the end has paths past all layers, but none from the first product.
    """
    given = {spec.name for spec in program.entry.inputs if spec.role in ("tokens", "values", "pictures")}
    embedded: list[fx.Node] = []
    numbers: list[fx.Node] = []
    for node in program.graph.graph.nodes:
        if node.target is aten.embedding.default and derives_from(node.args[1], given):
            embedded.append(node)
        elif node.meta.get("input") in given and node.meta["val"].dtype.is_floating_point:
            numbers.append(node)
    return (*embedded, *numbers, *_first_products(numbers), *_queries(program))


def _queries(program: Program) -> list[fx.Node]:
    """What a decoder of learnt queries begins with, `[B, N, d]`: zeros, or a table that is the same for each row."""
    found = []
    for node in program.graph.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.dtype.is_floating_point:
            continue
        if isinstance(value.shape[0], int) or not all(isinstance(size, int) and size > 1 for size in value.shape[1:]):
            continue
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.zeros, *_SHAPED) or (packet in (aten.expand, aten.repeat) and _from_weights(node.args[0])):  # type: ignore[arg-type]
            found.append(node)
    return found


def _first_products(numbers: Sequence[fx.Node]) -> list[fx.Node]:
    """Matrix products and convolutions that read inputs of numbers behind no other product."""
    found: list[fx.Node] = []
    read, behind = set(numbers), set[fx.Node]()
    for node in numbers[0].graph.nodes if numbers else ():
        sources = [source for source in node.all_input_nodes if not _is_size(source)]
        product = getattr(node.target, "overloadpacket", None) in (aten.linear, aten.addmm, *_CONVOLUTIONS)
        if any(source in behind for source in sources):
            behind.add(node)
        elif any(source in read for source in sources):
            (behind if product else read).add(node)
            found += [node] if product else []
    return found


def stream(program: Program, start: fx.Node) -> tuple[tuple[fx.Node, ...], set[fx.Node]]:
    """Nodes that every path from `start` to the first result passes, in order, and all nodes on such paths."""
    result = program.output_nodes[0]
    forward = reachable([start], lambda n: n.users)
    # Sizes are read off one tensor and used at another, and tokens are chosen by scores: no value passes there.
    back = reachable([result], lambda n: n.all_input_nodes)
    both = {n for n in back if n in forward and not _is_size(n) and n.target not in _CHOICES}
    if shaped := {n for n in both if getattr(n.target, "overloadpacket", None) in _SHAPED and n is not start}:
        # Tensors that take a shape alone: what passes through them, and nowhere else, is no value of the stream.
        both = {n for n in reachable([start], lambda n: n.users if n not in shaped else ()) if n in both - shaped}
    if result not in both:
        return (), both
    if start is result:
        return (start,), both
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in both:
        for user in node.users:
            if user in both:
                graph.add_edge(user, node)
    dominators = nx.immediate_dominators(graph, result)
    # Walking dominators of the reversed graph from the start lists the points in stream order.
    points, node = [start], start
    while node is not result:
        node = dominators[node]
        points.append(node)
    return tuple(points), both


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | torch.SymInt)


@dataclass(frozen=True)
class Parts:
    """What sub-layers are told apart by: attention cores, down projections, what lies inside feed-forwards, and softmaxes
    that are part of no attention core."""

    cores: set[fx.Node]
    downs: set[fx.Node]
    within: set[fx.Node]
    softmaxes: set[fx.Node]


def sublayers(
    points: Sequence[fx.Node], inside: set[fx.Node], order: dict[fx.Node, int], parts: Parts
) -> tuple[SubLayer, ...]:
    """Regions between consecutive points of a stream, with what they hold."""
    found = []
    for entry, exit in pairwise(points):
        nodes = sorted(_between(entry, exit, inside), key=order.__getitem__)
        residual = same_shape(entry, exit) and _is_residual(entry, exit, set(nodes))
        found.append(_sublayer(entry, exit, nodes, residual, parts))
    return tuple(found)


def _sublayer(entry: fx.Node, exit: fx.Node, nodes: Sequence[fx.Node], residual: bool, parts: Parts) -> SubLayer:
    attends = any(node in parts.cores for node in nodes)
    feeds = any(node in parts.downs for node in nodes)
    kind = {(True, True): "parallel", (True, False): "attention", (False, True): "feed_forward"}.get(
        (attends, feeds), "other"
    )
    if residual and not attends:
        own = set(nodes)
        mixes = mixing(entry, own - parts.within, parts.softmaxes) is not None
        kind = "mixer" if mixes or _mixes_by_weights(entry, own) else kind
    return SubLayer(kind, entry, exit, tuple(nodes), residual, feeds)


def parted(region: SubLayer, parts: Parts) -> tuple[SubLayer, ...]:
    """A region as the layers of the residual chain inside it, or as it is.

    Values pass beside the points of such a chain: keys that a later layer reads too, or the embedding that every layer
    reads again. Taking a layer out leaves what others read of it.
    """
    points = chain(region.nodes, _RESIDUAL, region.entry if region.residual else None)
    if len(points) < 3:
        return (region,)
    first, *rest = points
    made = shares(points, region.nodes)
    found = [] if first is region.entry else [_sublayer(region.entry, first, made[0], False, parts)]
    found += [_sublayer(a, b, nodes, True, parts) for (a, b), nodes in zip(pairwise(points), made[1:-1], strict=True)]
    if rest[-1] is not region.exit:
        found.append(_sublayer(rest[-1], region.exit, made[-1], False, parts))
    return tuple(found)


def _between(entry: fx.Node, exit: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Nodes on paths from entry (excluded) to exit (included): every way on from the entry leads through the exit."""
    found: set[fx.Node] = set()
    stack = [entry]
    while stack:
        for user in stack.pop().users:
            if user in inside and user not in found:
                found.add(user)
                if user is not exit:
                    stack.append(user)
    return found


def _is_residual(entry: fx.Node, exit: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether the exit is the entry plus something, through sums, scales, norms and layouts alone."""
    stack, seen = [exit], {exit}
    while stack:
        node = stack.pop()
        for source in [node.args[1]] if mixes_streams(node) else node.all_input_nodes:
            if source is entry:
                return True
            passes = getattr(source.target, "overloadpacket", None) in _RESIDUAL or mixes_streams(source)  # type: ignore[union-attr]
            if source in nodes and source not in seen and passes:
                seen.add(source)  # type: ignore[arg-type]
                stack.append(source)  # type: ignore[arg-type]
    return False


def mixing(entry: fx.Node, nodes: set[fx.Node], softmaxes: set[fx.Node]) -> str | None:
    """How a region without attention mixes tokens: `softmax`, `sampling`, `recurrence`, `fourier`, `convolution`, or None."""
    kinds = {"softmax"} if softmaxes & nodes else set()
    if _takes_apart(entry, nodes):
        kinds.add("recurrence")
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _CONVOLUTIONS:
            kinds.add("convolution")
        elif packet is not None and str(packet).startswith("aten.fft_"):
            kinds.add("fourier")
        elif packet is aten.grid_sampler:
            kinds.add("sampling")
        elif (
            (packet in _RECURRENCES and _mixes(node, packet))
            or "scan" in str(getattr(node.target, "_name", ""))
            or str(node.target).startswith("while_loop")
        ):
            kinds.add("recurrence")
    return next(
        (kind for kind in ("softmax", "sampling", "recurrence", "fourier", "convolution") if kind in kinds), None
    )


def _takes_apart(entry: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether a loop over the tokens was unrolled: one after another is picked, of all that there are."""
    shape = entry.meta["val"].shape
    length = shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 0
    picked: dict[object, set[object]] = {}
    for node in nodes:
        if length > 1 and getattr(node.target, "overloadpacket", None) is aten.select:
            source, axis, place = node.args[:3]
            if source.meta["val"].shape[axis] == length:  # type: ignore[union-attr,index]
                picked.setdefault((source, axis), set()).add(place)
    return any(len(places) == length for places in picked.values())


def _mixes_by_weights(entry: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether the first products of a region run over another axis than the stream's width: that of the tokens."""
    stack, seen = [entry], set()
    turned = False
    while stack:
        for user in stack.pop().users:
            if user not in nodes or user in seen:
                continue
            seen.add(user)
            packet = getattr(user.target, "overloadpacket", None)
            if packet in (aten.linear, aten.addmm):
                read = user.args[1 if packet is aten.addmm else 0]
                turned |= read.meta["val"].shape[-1] != entry.meta["val"].shape[-1]  # type: ignore[union-attr]
            elif packet in _RESIDUAL:
                stack.append(user)
    return turned


def _mixes(node: fx.Node, packet: object) -> bool:
    """Whether an operation joins entries of one sequence: sums along it, and products of two activations."""
    if packet in (aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.tril, aten.triu):
        return bool(node.meta["val"].dtype.is_floating_point)
    factors = node.args[1] if packet is aten.einsum else node.args[:2]
    if any(not isinstance(f, fx.Node) or _from_weights(f) for f in factors):  # type: ignore[union-attr]
        return False
    return any(not isinstance(size, int) for size in _summed(node, packet))


def _summed(node: fx.Node, packet: object) -> list[object]:
    """Sizes of the axes that a product of two activations sums over: mixing experts sums over experts, not tokens."""
    if packet is not aten.einsum:
        return [node.args[0].meta["val"].shape[-1]]  # type: ignore[union-attr]
    terms, _, kept = str(node.args[0]).replace(" ", "").partition("->")
    found: list[object] = []
    for term, factor in zip(terms.split(","), node.args[1], strict=True):  # type: ignore[arg-type]
        head, dots, tail = term.partition("...")
        shape = factor.meta["val"].shape  # type: ignore[union-attr]
        named = [*zip(head, shape, strict=False), *(zip(reversed(tail), reversed(shape), strict=False) if dots else ())]
        found += [size for letter, size in named if letter not in kept]
    return found


def _from_weights(node: fx.Node) -> bool:
    """Whether a factor is a weight, a rearranged one, or one that is picked by index."""
    while "weight" not in node.meta:
        packet = getattr(node.target, "overloadpacket", None)
        layout = (aten.index, aten.transpose, aten.t, aten.permute, aten.to, aten.view, aten.reshape, aten.unsqueeze)
        if packet not in (*layout, aten.expand, aten.contiguous, aten.select, aten.slice):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True


# A sub-layer that mixes tokens and feeds forward is a layer of its own where it repeats.
_LETTER = {"attention": "a", "mixer": "a", "parallel": "p", "feed_forward": "f", "other": "o"}


def _letter(sublayer: SubLayer, crosses: set[SubLayer]) -> str:
    if sublayer in crosses:
        return "c"
    return "p" if sublayer.kind == "mixer" and sublayer.feeds else _LETTER[sublayer.kind]


def layers(found: Sequence[SubLayer], crosses: set[SubLayer]) -> list[list[SubLayer]]:
    """Runs of residual sub-layers cut into layers.

    Where the kinds repeat with a period, each period is a layer; elsewhere a layer begins at a sub-layer that mixes
    tokens, cross-attention that follows another attention excepted. What is left over at either end (embedding norms,
    final norms) belongs to no layer.
    """
    runs: list[list[SubLayer]] = [[]]
    for sublayer in found:
        plain = sublayer.kind == "other" and (same_shape(sublayer.entry, sublayer.exit) or _is_reshape(sublayer))
        if sublayer.residual or plain:
            runs[-1].append(sublayer)
        elif runs[-1]:
            runs.append([])
    made: list[list[SubLayer]] = []
    for run in runs:
        kinds = "".join(_letter(s, crosses) for s in run)
        made.extend(run[a:b] for a, b in _cuts(kinds))
    return made


def _is_reshape(sublayer: SubLayer) -> bool:
    """Whether nothing happens but that batch and length are folded into one axis or parted again."""
    return len(sublayer.nodes) == 1 and getattr(sublayer.exit.target, "overloadpacket", None) in (
        aten.view,
        aten.reshape,
    )


def _cuts(kinds: str) -> list[tuple[int, int]]:
    begin = len(kinds) - len(kinds.lstrip("o"))
    if not set(kinds) & set("apc"):
        return []
    for period in range(1, (len(kinds) - begin) // 2 + 1):
        unit = kinds[begin : begin + period]
        count = 1
        while kinds[begin + count * period : begin + (count + 1) * period] == unit:
            count += 1
        rest = kinds[begin + count * period :]
        if count > 1 and set(unit) & set("apc") and not rest.strip("o"):
            return [(begin + i * period, begin + (i + 1) * period) for i in range(count)]
    return _irregular(kinds)


def _irregular(kinds: str) -> list[tuple[int, int]]:
    firsts: list[int] = []
    seen: set[str] = set()
    for i, kind in enumerate(kinds):
        # Self- and cross-attention share a layer, in either order, until it has fed forward.
        if kind in "apc" and (not firsts or kind in seen or seen & {"f", "p"} or (kind == "p" and seen & {"a", "c"})):
            firsts.append(i)
            seen = set()
        seen.add(kind)
    bounds = list(zip(firsts, [*firsts[1:], len(kinds)], strict=True))
    first, end = bounds[-1]
    tail = kinds[first:end]
    if len(bounds) > 1 and tail.startswith(previous := kinds[slice(*bounds[-2])]):
        bounds[-1] = (first, first + len(previous))
    else:
        # A norm after the last part stays with it only where norms stand between the parts as well.
        body = tail.rstrip("o")
        bounds[-1] = (first, first + len(body) + ("o" in body and tail != body))
    return bounds
