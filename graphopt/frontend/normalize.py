"""Normalise an exported graph: inline wrappers, drop asserts and no-ops, raise idioms to graphopt ops.

Matching happens before any decomposition, because decompositions explode attention. Each rule is a local rewrite that
keeps the function; capture checks the whole against the original module at a shape that was not captured.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from graphopt.frontend.inplace import functionalise
from graphopt.frontend.matching import is_op
from graphopt.frontend.raise_attention import raise_spelled_attention, visibility
from graphopt.frontend.raise_rotary import raise_rotary
from graphopt.frontend.raise_rows import raise_last_marked
from graphopt.frontend.shared_heads import drop_round_trips, share_heads
from graphopt.ir.purity import eliminate_dead_code

aten = torch.ops.aten
_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range")
# The spellings of Python's operators on tensors.
_BITWISE = {aten.__or__: aten.bitwise_or, aten.__and__: aten.bitwise_and, aten.__xor__: aten.bitwise_xor}
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def normalize(graph_module: fx.GraphModule) -> None:
    """Normalise in place."""
    inline_wrappers(graph_module)
    graph = graph_module.graph
    drop_asserts(graph)
    functionalise(graph)
    eliminate_dead_code(graph)
    join_pieces(graph)
    drop_no_ops(graph)
    drop_empty_pieces(graph)
    simplify_calls(graph)
    constant_devices(graph)
    raise_last_marked(graph)
    raise_attention(graph)
    raise_spelled_attention(graph)
    drop_round_trips(graph)
    share_heads(graph)
    eliminate_dead_code(graph)
    merge_masks(graph)
    raise_rms_norm(graph)
    raise_rotary(graph)
    eliminate_dead_code(graph)
    graph.lint()
    graph_module.recompile()


def inline_wrappers(graph_module: fx.GraphModule) -> None:
    """Replace calls of grad-mode and autocast wrappers by the nodes of their submodules."""
    changed = True
    while changed:
        changed = False
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function" or getattr(node.target, "_name", None) not in _WRAPPERS:
                continue
            body_position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
            body_node = node.args[body_position]
            body = getattr(graph_module, body_node.target)
            _inline(graph_module.graph, node, body.graph, node.args[body_position + 1 :])
            changed = True
        for node in list(graph_module.graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph_module.graph.erase_node(node)


def _inline(graph: fx.Graph, call: fx.Node, body: fx.Graph, arguments: tuple[Any, ...]) -> None:
    mapping: dict[fx.Node, Any] = {}
    placeholders = iter(arguments)
    results: tuple[Any, ...] = ()
    with graph.inserting_before(call):
        for node in body.nodes:
            if node.op == "placeholder":
                mapping[node] = next(placeholders)
            elif node.op == "output":
                value = fx.node.map_arg(node.args[0], lambda n: mapping[n])
                results = tuple(value) if isinstance(value, tuple | list) else (value,)
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        else:
            user.replace_input_with(call, results[0])
    graph.erase_node(call)


def drop_asserts(graph: fx.Graph) -> None:
    """Remove the assertions that export inserts; shapes are checked by our own verification."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and any(word in str(node.target) for word in _ASSERTS):
            graph.erase_node(node)


def drop_no_ops(graph: fx.Graph) -> None:
    """Remove evaluation-mode dropout, aliases, detaches, products by 1, casts and reshapes to what a tensor is, and
    stacks of which one piece is picked."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        drop = is_op(node, aten.alias, aten.detach, aten.detach_, aten.lift_fresh_copy, aten.lift_fresh)
        if is_op(node, aten.mul) and len(node.args) == 2 and isinstance(node.args[1], int | float):
            drop = node.args[1] == 1 and source.meta["val"].dtype == node.meta["val"].dtype
        if is_op(node, aten.view, aten.reshape):
            drop = [str(size) for size in source.meta["val"].shape] == [str(size) for size in node.meta["val"].shape]
        if is_op(node, aten.dropout, aten.dropout_, aten.feature_dropout):
            drop = not node.args[2] or node.args[1] == 0
        if is_op(node, aten.to, aten.type_as, aten._to_copy):
            before, after = source.meta.get("val"), node.meta.get("val")
            if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
                if before.dtype == after.dtype:
                    drop = True
                else:
                    with graph.inserting_before(node):
                        cast = graph.call_function(aten.to.dtype, (source, after.dtype))
                    cast.meta = dict(node.meta)
                    node.replace_all_uses_with(cast)
                    graph.erase_node(node)
                    continue
        if is_op(node, aten.select) and is_op(source, aten.stack):
            pieces, axis = source.args[0], source.args[1] if len(source.args) > 1 else 0
            if node.args[1] == axis and isinstance(node.args[2], int):
                drop, source = True, pieces[node.args[2]]
        if drop:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def drop_empty_pieces(graph: fx.Graph) -> None:
    """Remove pieces of width 0 from concatenations (the unrotated rest of a fully rotated head) and cats of one."""
    for node in list(graph.nodes):
        if not is_op(node, aten.cat):
            continue
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        pieces = [piece for piece in node.args[0] if not _is_empty(piece, dim)]
        if len(pieces) == 1:
            node.replace_all_uses_with(pieces[0])
            graph.erase_node(node)
        elif len(pieces) < len(node.args[0]):
            node.args = (pieces, dim)
    for node in reversed(list(graph.nodes)):
        if is_op(node, aten.slice) and not node.users:
            graph.erase_node(node)


def _is_empty(piece: fx.Node, dim: int) -> bool:
    shape = piece.meta["val"].shape
    # A cat takes an empty vector for a piece of any rank.
    size = shape[dim] if len(shape) > 1 else shape[0]
    return isinstance(size, int) and size == 0


def join_pieces(graph: fx.Graph) -> None:
    """Tensors that are made empty and filled piece by piece along one axis become the concatenation of the pieces."""
    for node in list(graph.nodes):
        if not is_op(node, aten.slice_scatter) or any(is_op(user, aten.slice_scatter) for user in node.users):
            continue
        chain: list[fx.Node] = []
        base: Any = node
        while is_op(base, aten.slice_scatter) and (not chain or len(base.users) == 1):
            chain.append(base)
            base = base.args[0]
        if not is_op(base, aten.new_empty, aten.empty, aten.empty_like):
            continue
        rank = node.meta["val"].dim()
        axes = {write.args[2] % rank for write in chain if len(write.args) == 5}  # type: ignore[operator]
        size = node.meta["val"].shape[next(iter(axes))] if len(axes) == 1 else None
        if not isinstance(size, int) or any(len(write.args) != 5 for write in chain):
            continue
        pieces = [(write.args[3] or 0, min(write.args[4] or size, size), write.args[1]) for write in chain]  # type: ignore[type-var]
        pieces.sort(key=lambda piece: piece[0])  # type: ignore[arg-type,return-value]
        ends = [0, *(end for _, end, _ in pieces)]
        if any(not isinstance(begin, int) or begin != end for (begin, _, _), end in zip(pieces, ends, strict=False)):
            continue
        if ends[-1] != size or any(piece.meta["val"].dtype != node.meta["val"].dtype for _, _, piece in pieces):  # type: ignore[union-attr]
            continue
        with graph.inserting_before(node):
            new = graph.call_function(aten.cat.default, ([piece for _, _, piece in pieces], next(iter(axes))))
        _replace(graph, node, new)


def simplify_calls(graph: fx.Graph) -> None:
    """Say in one way what models say in several: x @ w.T is a linear, a view a reshape, a list of neighbours a slice."""
    for node in list(graph.nodes):
        if is_op(node, aten.view, aten._unsafe_view) and node.target is not aten.view.dtype:
            # What rules put before a view may lie in memory in another order.
            node.target = aten.reshape.default
        if is_op(node, *_BITWISE) and node.target._overloadname in ("Tensor", "Scalar"):
            node.target = getattr(_BITWISE[node.target.overloadpacket], node.target._overloadname)
        if is_op(node, aten.matmul, aten.mm) and is_op(node.args[1], aten.numpy_T, aten.t, aten.transpose):
            weight = node.args[1].args[0]
            if "weight" in weight.meta and weight.meta["val"].dim() == 2:
                with graph.inserting_before(node):
                    new = graph.call_function(aten.linear.default, (node.args[0], weight))
                _replace(graph, node, new)
        elif is_op(node, aten.index):
            indices = list(node.args[1])
            given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
            constant = given[0][1].meta.get("constant") if len(given) == 1 else None
            if constant is None or constant.dim() != 1 or constant.dtype != torch.int64:
                continue
            axis, size = given[0][0], node.args[0].meta["val"].shape[given[0][0]]
            values = [int(v) % size for v in constant] if isinstance(size, int) else []
            if values and values == list(range(values[0], values[0] + len(values))):
                with graph.inserting_before(node):
                    new = graph.call_function(aten.slice.Tensor, (node.args[0], axis, values[0], values[-1] + 1))
                _replace(graph, node, new)
        elif is_op(node, aten.einsum) and len(node.args[1]) == 2:
            _product_of_einsum(graph, node)


def _product_of_einsum(graph: fx.Graph, node: fx.Node) -> None:
    """`...ij,...jk->...ik` and `...id,...jd->...ij` over two activations become the matrix products that they are."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    if "." in terms or not len(first) == len(second) == len(result) or len(result) not in (3, 4):
        return
    lead, i, j = first[:-2], first[-2], first[-1]
    if second[:-2] != lead or result[:-2] != lead or len(set(first + second)) != len(lead) + 3:
        return
    left, right = node.args[1]  # type: ignore[misc]
    if result[-2] != i or (second[-2:] + result[-1]) not in (j + result[-1] * 2, result[-1] + j + result[-1]):
        return
    with graph.inserting_before(node):
        if second[-2] != j:
            turned = graph.call_function(aten.transpose.int, (right, -2, -1))
            turned.meta = {**right.meta, "val": right.meta["val"].transpose(-2, -1)}  # type: ignore[union-attr]
            right = turned
        new = graph.call_function(aten.matmul.default, (left, right))
    _replace(graph, node, new)


def constant_devices(graph: fx.Graph) -> None:
    """Name the capture device `cpu` in every argument; runs map it to where they happen."""
    cpu = torch.device("cpu")
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda a: cpu if isinstance(a, torch.device) else a)
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: cpu if isinstance(a, torch.device) else a)


def raise_attention(graph: fx.Graph) -> None:
    """Turn `scaled_dot_product_attention` into `graphopt::attention` (queries and keys of one length when causal)."""
    for node in list(graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention):
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q = given["query"].meta["val"]
        if q.dim() != 4 or given.get("dropout_p", 0.0) or not isinstance(given.get("is_causal", False), bool):
            continue
        scale = given.get("scale")
        scale = float(scale) if scale is not None else 1.0 / math.sqrt(q.shape[-1])
        mask = given.get("attn_mask")
        if mask is not None and mask.meta["val"].dim() != 4:
            # Our op reads two axes as key padding [B, T], where this one broadcasts them as [S, T].
            with graph.inserting_before(node):
                for _ in range(4 - mask.meta["val"].dim()):
                    wider = graph.call_function(aten.unsqueeze.default, (mask, 0))
                    wider.meta = {"val": mask.meta["val"].unsqueeze(0)}
                    mask = wider
            given["attn_mask"] = mask
        with graph.inserting_before(node):
            new = graph.call_function(
                torch.ops.graphopt.attention.default,
                (
                    given["query"],
                    given["key"],
                    given["value"],
                    given.get("attn_mask"),
                    None,
                    scale,
                    given.get("is_causal", False),
                    None,
                    None,
                ),
            )
        _replace(graph, node, new)


def merge_masks(graph: fx.Graph) -> None:
    """Move a mask's causality and window into the attention that reads it, leaving key padding `[B, T]` or nothing."""
    for node in list(graph.nodes):
        if not is_op(node, torch.ops.graphopt.attention):
            continue
        mask = visibility(node.args[3]) or node.args[3]
        if not is_op(mask, torch.ops.graphopt.attention_mask) or node.args[6]:
            continue
        _, padding, _, _, causal, window = mask.args
        arguments = list(node.args)
        arguments[3], arguments[6], arguments[7] = padding, causal, window
        node.args = tuple(arguments)


def raise_rms_norm(graph: fx.Graph) -> None:
    """Raise x * rsqrt(mean(x^2, -1) + eps), its casts and its gain to `graphopt::rms_norm`."""
    for node in list(graph.nodes):
        if is_op(node, aten.rms_norm):
            _raise_aten_rms_norm(graph, node)
        elif is_op(node, aten.rsqrt) or (is_op(node, aten.pow) and node.args[1] == -0.5):
            _raise_rms_idiom(graph, node)


def _raise_aten_rms_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, sizes, *rest = node.args
    weight = rest[0] if rest else node.kwargs.get("weight")
    eps = rest[1] if len(rest) > 1 else node.kwargs.get("eps")
    if len(sizes) != 1:  # type: ignore[arg-type]
        return
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps  # type: ignore[union-attr]
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.graphopt.rms_norm.default, (x, weight, float(eps), True))  # type: ignore[arg-type]
    _replace(graph, node, new)


def _raise_rms_idiom(graph: fx.Graph, rsqrt: fx.Node) -> None:
    shifted = rsqrt.args[0]
    if not is_op(shifted, aten.add) or len(rsqrt.users) != 1:
        return
    mean, eps = shifted.args[:2]  # type: ignore[union-attr]
    if not is_op(mean, aten.mean) or not isinstance(eps, float | int):
        return
    axes, keep = mean.args[1], len(mean.args) > 2 and mean.args[2]  # type: ignore[union-attr,index]
    if list(axes) not in ([-1], [mean.meta["val"].dim() - 1]) or not keep:  # type: ignore[union-attr,call-overload]
        return
    square = mean.args[0]  # type: ignore[union-attr]
    if (is_op(square, aten.pow) and square.args[1] == 2) or (
        is_op(square, aten.mul) and square.args[0] is square.args[1]
    ):  # type: ignore[union-attr]
        wide = square.args[0]  # type: ignore[union-attr]
    else:
        return
    product = next(iter(rsqrt.users))
    if not is_op(product, aten.mul) or set(product.args) != {wide, rsqrt}:
        return
    x = wide
    if is_op(wide, aten.to) and set(wide.users) <= {square, product}:  # type: ignore[union-attr]
        x = wide.args[0]  # type: ignore[union-attr]
    dtype = x.meta["val"].dtype  # type: ignore[union-attr]
    root, weight, in_float = _gain(product, dtype)
    if root.meta["val"].dtype != dtype:
        return
    with graph.inserting_before(root):
        new = graph.call_function(torch.ops.graphopt.rms_norm.default, (x, weight, float(eps), in_float))  # type: ignore[arg-type]
    _replace(graph, root, new)


def _gain(product: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node | None, bool]:
    """The last node of a norm idiom, its gain `[d]` and whether the gain multiplies before the cast back."""

    def only_user(node: fx.Node, *targets: Any) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and is_op(users[0], *targets) else None

    def gain_of(node: fx.Node, normed: fx.Node) -> fx.Node | None:
        others = [a for a in node.args if a is not normed]
        found = others[0] if len(others) == 1 else None
        return found if isinstance(found, fx.Node) and found.meta["val"].dim() == 1 else None

    cast = only_user(product, aten.to)
    if product.meta["val"].dtype == dtype:
        scaled = only_user(product, aten.mul)
        weight = gain_of(scaled, product) if scaled is not None else None
        if scaled is not None and weight is not None:
            return scaled, weight, False
        return product, None, False
    if cast is not None and cast.meta["val"].dtype == dtype:
        scaled = only_user(cast, aten.mul)
        weight = gain_of(scaled, cast) if scaled is not None else None
        if scaled is not None and weight is not None:
            return scaled, weight, False
        return cast, None, False
    scaled = only_user(product, aten.mul)
    weight = gain_of(scaled, product) if scaled is not None else None
    if scaled is not None and weight is not None:
        back = only_user(scaled, aten.to)
        if back is not None and back.meta["val"].dtype == dtype:
            return back, weight, True
    return product, None, False


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    _erase_dead(graph, old.all_input_nodes)


def _erase_dead(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    for node in nodes:
        if not node.users and node.op == "call_function":
            inputs = node.all_input_nodes
            graph.erase_node(node)
            _erase_dead(graph, inputs)
