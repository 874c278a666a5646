"""Raise the choice of each row's last marked token, which models spell with a tensor of unknown length."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.frontend.matching import is_op

aten = torch.ops.aten


def raise_last_marked(graph: fx.Graph) -> None:
    """`x[mask].view(B, -1, D)[:, -1]` becomes a choice by index: of each row the last token that `mask [B, S]` marks.

    The reshape demands that every row marks as many tokens as the others, and at least one; so does the result.
    """
    for node in list(graph.nodes):
        if not is_op(node, aten.select) or tuple(node.args[1:3]) != (1, -1):
            continue
        rows = node.args[0]
        if not is_op(rows, aten.view, aten.reshape) or rows.meta["val"].dim() != 3:
            continue
        marked = rows.args[0]
        if not is_op(marked, aten.index) or len(marked.args[1]) != 1 or marked.meta["val"].dim() != 2:
            continue
        x, mask = marked.args[0], marked.args[1][0]
        if mask.meta["val"].dtype == torch.bool and mask.meta["val"].dim() == 2 and x.meta["val"].dim() == 3:
            _emit(graph, node, x, mask)


def _emit(graph: fx.Graph, node: fx.Node, x: fx.Node, mask: fx.Node) -> None:
    mode = x.meta["val"].fake_mode
    cpu = torch.device("cpu")

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        with mode:
            value = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        made.meta = {**node.meta, "val": value}
        return made

    with graph.inserting_before(node):
        batch, length = (call(aten.sym_size.int, mask, axis) for axis in (0, 1))
        numbers = call(aten.arange.default, length, device=cpu)
        last = call(aten.argmax.default, call(aten.mul.Tensor, numbers, mask), -1)
        chosen = call(aten.index.Tensor, x, [call(aten.arange.default, batch, device=cpu), last])
    node.replace_all_uses_with(chosen)
    graph.erase_node(node)
