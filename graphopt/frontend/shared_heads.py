"""Take out what only rearranges heads around `graphopt::attention`: repetition, which it does by itself, and round trips."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.frontend.matching import is_op, through

aten = torch.ops.aten


def share_heads(graph: fx.Graph) -> None:
    """Let every attention whose keys and values are repeated head by head read them as they were before."""
    for node in list(graph.nodes):
        if not is_op(node, torch.ops.graphopt.attention):
            continue
        q, k, v = node.args[:3]
        found = [_unrepeated(graph, node, side) for side in (k, v)]
        if None in found or q.meta["val"].dim() != 4:
            continue
        sizes = {side.meta["val"].shape[1] for side in found}  # type: ignore[union-attr]
        heads = q.meta["val"].shape[1]
        if len(sizes) == 1 and all(isinstance(size, int) and heads % size == 0 for size in (heads, *sizes)):
            node.args = (q, *found, *node.args[3:])


def drop_round_trips(graph: fx.Graph) -> None:
    """Let a reshape of a reshape read the tensor behind both, and go where it restores what that tensor is.

    Attention that folds its heads into the batch does this around every product; sizes that count batch and heads
    together then go with it.
    """
    layout = (aten.view, aten.reshape, aten._unsafe_view)
    for node in list(graph.nodes):
        if not is_op(node, *layout):
            continue
        if _parts_heads(graph, node):
            continue
        root = through(node.args[0], *layout, aten.contiguous, aten.clone)
        same = [str(size) for size in root.meta["val"].shape] == [str(size) for size in node.meta["val"].shape]
        # A view needs its source laid out in order, which only the copy in between may have made sure of.
        if root is node.args[0]:
            continue
        if same and not any(is_op(user, aten.view) for user in node.users):
            node.replace_all_uses_with(root)
            graph.erase_node(node)
        elif is_op(node, aten.reshape):
            node.args = (root, *node.args[1:])


def _parts_heads(graph: fx.Graph, node: fx.Node) -> bool:
    """[S, B, H * D] by way of [S, B * H, D] and its transpose to [B, H, S, D]: parted at once and permuted instead."""
    turned = node.args[0]
    if not is_op(turned, aten.transpose) or {a % 3 for a in turned.args[1:3]} != {0, 1}:  # type: ignore[union-attr,operator]
        return False
    folded = turned.args[0]  # type: ignore[union-attr]
    if not is_op(folded, aten.view, aten.reshape) or folded.meta["val"].dim() != 3:  # type: ignore[union-attr]
        return False
    source = folded.args[0]  # type: ignore[union-attr]
    before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if (
        len(before) != 3
        or len(after) != 4
        or not all(isinstance(size, int) for size in (before[2], after[1], after[3]))
    ):
        return False
    if [str(before[0]), str(before[1]), before[2]] != [str(after[2]), str(after[0]), after[1] * after[3]]:
        return False
    with graph.inserting_before(node):
        sizes = [
            _call(graph, node, aten.sym_size.int, source, i) if not isinstance(before[i], int) else before[i]
            for i in (0, 1)
        ]
        parted = _call(graph, node, aten.reshape.default, source, [*sizes, after[1], after[3]])
        made = _call(graph, node, aten.permute.default, parted, [1, 2, 0, 3])
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return True


def _unrepeated(graph: fx.Graph, reader: fx.Node, x: Any) -> fx.Node | None:
    """[B, K, T, D] behind [B, K * G, T, D] in which each head stands G times in a row."""
    if is_op(x, aten.repeat_interleave) and len(x.args) == 3 and x.args[2] in (1, -3) and isinstance(x.args[1], int):
        return x.args[0]  # type: ignore[no-any-return]
    turned = is_op(x, aten.transpose) and {a % 4 for a in x.args[1:3]} == {1, 2}
    joined = x.args[0] if turned else x
    if not is_op(joined, aten.reshape, aten.view, aten._unsafe_view, aten.flatten):
        return None
    wide = through(joined.args[0], aten.clone, aten.contiguous)
    if not is_op(wide, aten.expand) or wide.meta["val"].dim() != 5:
        return None
    narrow, place = wide.args[0], 3 if turned else 2
    before, after, flat = narrow.meta["val"].shape, wide.meta["val"].shape, joined.meta["val"].shape
    same = all(str(a) == str(b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != place)
    merged = [str(size) for i, size in enumerate(after) if i not in (place - 1, place)]
    rest = [str(size) for i, size in enumerate(flat) if i != place - 1]
    if len(before) != 5 or before[place] != 1 or not same or merged != rest:
        return None
    with graph.inserting_before(reader):
        made = _call(graph, x, aten.squeeze.dim, narrow, place)
        return _call(graph, x, aten.transpose.int, made, 1, 2) if turned else made


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = {**like.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
    return made
