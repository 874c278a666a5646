"""What tokens are chosen by, as nodes of the graph: one number `[B, S]` a token at the stream point of a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.ir.follow import At, Lost, follow, rank
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const
from graphopt.passes.tokens.options import Attention, Norm, Pairs, Predictor, Random, Windows

if TYPE_CHECKING:
    from graphopt.passes.tokens.stage import Stage
    from graphopt.passes.tokens.walk import Walk

aten = torch.ops.aten
ops = torch.ops.graphopt


def score_of(walk: Walk, stage: Stage, x: fx.Node, span: fx.Node, real: fx.Node) -> fx.Node:
    """Scores of the tokens of `x` `[B, S, d]`; `span` and `real` `[B, S]` say which may leave and which are there."""
    score = walk.selection.score
    if isinstance(score, Norm):
        return walk.call(aten.mean.dim, walk.call(aten.pow.Tensor_Scalar, x, 2), [-1])
    if isinstance(score, Random):
        there = walk.base(x)["real"]
        drawn = walk.call(ops.random_scores.default, there, score.seed)
        if walk.span.padding is not None:
            # Padding takes no place.
            behind = walk.call(aten.sub.Tensor, walk.call(aten.cumsum.default, there, 1), 1)
            drawn = walk.call(ops.take_tokens.default, drawn, walk.call(aten.clamp.default, behind, 0), 1)
        return walk.at_level(drawn)
    if isinstance(score, Pairs):
        return walk.call(ops.pair_scores.default, x, span)
    if isinstance(score, Windows):
        return walk.call(ops.window_scores.default, x, walk.span.front, *walk.span.grid, score.size)
    if isinstance(score, Predictor):
        return predicted(walk, stage, score, x)
    if isinstance(score, Attention):
        return _attention(walk, stage, score, x, span, real)
    return walk.call(ops.similarity_scores.default, x, _others(walk, span, real))


def predicted(walk: Walk, stage: Stage, score: Predictor, x: fx.Node) -> fx.Node:
    """What a stage's own network says of each token `[B, S]`."""
    value = walk.views.program.nodes[walk.span.blocks[stage.layer].entry.name].meta["val"]
    return network(walk.call, walk.rewriter, stage.weights, score, value, x)


def network(
    call: Callable[..., fx.Node],
    rewriter: Rewriter,
    names: tuple[str, ...],
    score: Predictor,
    value: torch.Tensor,
    x: fx.Node,
) -> fx.Node:
    """A new network's number for each token `[B, S]` of `x`, which is like `value`; `names` are its weights'."""
    generator = torch.Generator().manual_seed(score.seed)
    width, dtype = int(value.shape[-1]), value.dtype
    shapes = ((score.width, width), (score.width,), (1, score.width))
    made = []
    for name, shape in zip(names, shapes, strict=True):
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) == 2 else torch.zeros(shape)
        made.append(rewriter.add_weight(name, Const(tensor, dtype)))
    up, bias, down = made
    hidden = call(aten.gelu.default, call(aten.linear.default, x, up, bias))
    return call(aten.squeeze.dim, call(aten.linear.default, hidden, down), -1)


def presence(walk: Walk, score: fx.Node, span: fx.Node) -> fx.Node:
    """One for each token `[B, S]`, whose gradient is passed on to the token's score.

    What a token gives to others, its values, is multiplied by it: a norm would take it out of the stream again.
    """
    gate = walk.call(aten.sigmoid.default, score)
    nothing = walk.call(aten.sub.Tensor, gate, walk.call(aten.detach.default, gate))
    nothing = walk.call(aten.masked_fill.Scalar, nothing, walk.call(aten.logical_not.default, span), 0)
    return walk.call(aten.add.Tensor, nothing, 1)


def _others(walk: Walk, span: fx.Node, real: fx.Node) -> fx.Node:
    """The tokens that are there and may not leave."""
    return walk.call(aten.logical_and.default, real, walk.call(aten.logical_not.default, span))


def _attention(walk: Walk, stage: Stage, score: Attention, x: fx.Node, span: fx.Node, real: fx.Node) -> fx.Node:
    core = core_of(walk, stage, score)
    scale, causal, window, softcap = core.args[5:9]
    original = walk.masks.get(core, core.args[3])
    if window is not None:
        raise Lost(core, "has a window, so that the attention received does not compare all tokens")
    row = None
    if score.of == "class":
        row = walk.call(aten.zeros_like.default, walk.call(aten.slice.Tensor, span, 1, 0, 1), dtype=torch.int64)
    elif score.of == "last":
        row = walk.last_place()
    q, k, mask = core.args[0], core.args[1], core.args[3]
    if score.at == "next":
        q, k, mask = _ahead(walk, x, core, row)
    elif row is not None:
        q = walk.call(ops.take_tokens.default, q, row, 2)
    if row is None:
        rows = real if score.of == "all" else _others(walk, span, real)
        return walk.call(ops.received_attention.default, q, k, mask, rows, scale, causal, softcap)
    seen = real
    if isinstance(original, fx.Node) and rank(original) == 4:
        value = original.meta["val"]
        one = mask if value.shape[2] == 1 else walk.call(ops.take_tokens.default, mask, row, 2)
        seen = walk.hiding(one, value.dtype, real)
    return walk.call(ops.received_attention.default, q, k, seen, None, scale, False, softcap)


def core_of(walk: Walk, stage: Stage, score: Attention) -> fx.Node:
    """The attention whose queries and keys score: of the layer in front of the stage, or of the one behind."""
    layer = stage.layer - (score.at == "before")
    if layer < 0:
        raise Lost(walk.rewriter.node(walk.span.blocks[0].entry), "has no layer in front to score by: use at: next")
    block = walk.span.blocks[layer]
    own = [a for a in block.attentions if not a.cross and a.core.target is ops.attention.default]
    if not own:
        raise Lost(block.entry, f"has no plain self-attention in layer {layer} to score by")
    found: fx.Node = walk.rewriter.node((own[-1] if score.at == "before" else own[0]).core)
    return found


def _ahead(walk: Walk, x: fx.Node, core: fx.Node, row: fx.Node | None) -> tuple[fx.Node, fx.Node, Any]:
    """Queries, keys and mask of the next attention for the tokens in front of the stage: what leads to them, once more.

    With `row` `[B, 1]` there is one query a row.
    """
    point, level = next(p for p, s in walk.points.items() if s is walk.now_at), walk.count
    shared: dict[fx.Node, fx.Node] = {}

    def plain(node: fx.Node) -> fx.Node:
        """A node that no token reaches: itself, or a copy where it stands behind the stage."""
        if walk.order.get(node, 0) <= walk.order[point] or node.op != "call_function":
            return node
        if node not in shared:
            args, kwargs = fx.node.map_arg(node.args, plain), fx.node.map_arg(node.kwargs, plain)
            shared[node] = walk.call(node.target, *args, **kwargs)
            shared[node].meta["val"] = node.meta["val"]
        return shared[node]

    def again(end: fx.Node, start: fx.Node, row: fx.Node | None) -> fx.Node:
        """What leads from the stream to `end`, for all tokens of `start` or for those at `row`."""
        known: dict[fx.Node, At | None] = {point: At(1)}
        copies = {point: start if row is None else walk.call(ops.take_tokens.default, start, row, 1)}
        wanted = _between(walk, point, end)
        for node in walk.nodes:
            if node not in wanted:
                continue
            step = follow(node, known)
            known[node] = step.at
            sides = {}
            for operand, axis in step.meets:
                made = walk.level_side(plain(operand), axis, level, rank(node))
                if row is not None:
                    wide = axis + (rank(node) - rank(operand) if level else 0)
                    made, wide = (made, wide) if level else walk.leading(made, axis, rank(node))
                    made = walk.call(ops.take_tokens.default, made, row, wide)
                sides[operand] = made
            length = (walk.length(level) if level else None) if row is None else 1
            args = step.sizes(length) if step.sizes is not None and length is not None else node.args

            def mapped(
                value: fx.Node, sides: dict[fx.Node, fx.Node] = sides, copies: dict[fx.Node, fx.Node] = copies
            ) -> fx.Node:
                return sides[value] if value in sides else copies[value] if value in copies else plain(value)

            made = walk.call(node.target, *fx.node.map_arg(args, mapped), **fx.node.map_arg(node.kwargs, mapped))
            made.meta["val"] = node.meta["val"]
            copies[node] = made
        return copies[end]

    mask = core.args[3]
    if isinstance(mask, fx.Node):
        mask = plain(mask)
    if level:
        mask = walk.mask_at(core, mask, level)
    q, k = core.args[:2]
    return again(q, x, row), again(k, x, None), mask  # type: ignore[arg-type]


def _between(walk: Walk, point: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on paths from a point to an end."""
    ahead: set[fx.Node] = {point}
    for node in walk.nodes[walk.order[point] + 1 :]:
        if any(source in ahead for source in node.all_input_nodes):
            ahead.add(node)
    behind, stack = {end}, [end]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in ahead and source is not point and source not in behind:
                behind.add(source)
                stack.append(source)
    return behind
