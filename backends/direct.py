"""Graphs for a CPU as Dynamo captured them: library calls, with fewer of them, less memory and oneDNN's products.

Nothing is traced anew, so that compiling costs little more than Dynamo does. What is rewritten is float32 on a CPU and
records no gradient; all else runs as eager runs it. Norms, rotations and what is overwritten compute what eager computes
in another place; products round as another library does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.backends.index import sizes_of
from graphopt.backends.library import linear, rms_norm, rotate

_nn = torch._C._nn
_ADD, _MUL = (operator.add, torch.add), (operator.mul, torch.mul)
_AUGMENTED = {getattr(operator, name) for name in dir(operator) if name[0] == "i" and hasattr(operator, name[1:])}
_AUGMENTED |= {operator.iand, operator.ior, operator.setitem}
_LINEAR, _ADDMM, _MATMUL = (F.linear, _nn.linear), (torch.addmm,), (operator.matmul, torch.matmul)


def direct(graph: fx.GraphModule) -> Callable[..., Any]:
    """Rewrite a graph in place and give what runs it; no gradient may be recorded through it as a whole."""
    for rewrite in (_casts, _norms, _rotations, _products, _overwrites):
        for node in list(graph.graph.nodes):
            if not node._erased:
                rewrite(graph.graph, node)
    graph.recompile()
    run: Callable[..., Any] = graph.forward
    return run


def calls(graph: fx.Graph) -> dict[str, int]:
    """How often each function or method is called."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            name = f"Tensor.{node.target}" if node.op == "call_method" else node._pretty_print_target(node.target)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _value(node: Any) -> FakeTensor | None:
    """The fake value of a plain float32 tensor on a CPU; None for all else, tensors of functorch and subclasses too."""
    value: Any = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if type(value) is not FakeTensor or value.dtype != torch.float32:
        return None
    return value if value.device.type == "cpu" and value.layout == torch.strided else None


def _computed(node: Any) -> FakeTensor | None:
    """The value of a node that is such a tensor and records no gradient."""
    value = _value(node)
    return value if value is not None and not value.requires_grad else None


def _alike(*nodes: Any) -> bool:
    """Whether values have the same sizes and strides, without a guard on them."""
    values = [_computed(node) for node in nodes]
    if any(value is None for value in values):
        return False
    shapes = [
        (sizes_of(v), [s if isinstance(s, int) else s.node.expr for s in v.stride()]) for v in values if v is not None
    ]
    return all(shape == shapes[0] for shape in shapes)


def _only_reader(node: Any) -> Any:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _call(node: Any, functions: Sequence[Any], *methods: str) -> bool:
    """Whether a node calls one of these functions or methods of tensors."""
    if not isinstance(node, fx.Node):
        return False
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether something between two nodes may write into a tensor: then what is read early may not be read late."""
    node = first
    while node is not last:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        written = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if written or node.target in _AUGMENTED or node.kwargs.get("inplace") or name.endswith(("_", "_out")):
            return True
        node = node.next
    return False


def _replace(
    graph: fx.Graph, node: fx.Node, function: Callable[..., Any], *args: Any, parts: Sequence[fx.Node]
) -> None:
    """Put a call in place of `node`; `parts` go with it, readers first."""
    with graph.inserting_before(node):
        made = graph.call_function(function, args)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    for part in (node, *parts):
        if not part.users:
            graph.erase_node(part)


def _casts(graph: fx.Graph, node: Any) -> None:
    """Casts to what a tensor already is return the tensor."""
    if not _call(node, (), "to", "float") or node.kwargs.keys() - {"dtype", "device"}:
        return
    source, *kinds = node.args
    if any(not isinstance(kind, torch.dtype | torch.device | str) for kind in kinds):
        return
    if _value(node) is not None and _value(source) is not None:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _norms(graph: fx.Graph, node: Any) -> None:
    """Squares, their mean, the root and the products as one call."""
    if not _call(node, (torch.rsqrt,), "rsqrt") or _computed(node) is None:
        return
    total = node.args[0]
    if not _call(total, _ADD) or total.kwargs or _is_tensor(total.args[1]):
        return
    mean, eps = total.args
    if not _call(mean, (torch.mean,), "mean") or mean.args[1:] not in ((-1,), ([-1],), ((-1,),)):
        return
    square = mean.args[0]
    if dict(mean.kwargs) != {"keepdim": True} or not _call(square, (torch.pow, operator.pow), "pow"):
        return
    if square.args[1:] != (2,) or square.kwargs or any(len(n.users) != 1 for n in (node, total, mean, square)):
        return
    x, result, weight = square.args[0], _only_reader(node), None
    if not _call(result, _MUL) or set(result.args) != {x, node} or not _alike(x, result):
        return
    if _written_between(square, result):
        return
    parts = [node, total, mean, square]
    last = _only_reader(result)
    if _call(last, _MUL) and not last.kwargs and _alike(last, result):
        other = [a for a in last.args if a is not result]
        if len(other) == 1 and _value(other[0]) is not None and not _written_between(result, last):
            parts, result, weight = [result, *parts], last, other[0]
    _replace(graph, result, rms_norm, x, eps, weight, parts=parts)


def _is_tensor(value: Any) -> bool:
    return isinstance(value.meta.get("example_value") if isinstance(value, fx.Node) else value, torch.Tensor)


def _rotations(graph: fx.Graph, node: Any) -> None:
    """x cos + cat(-right, left) sin as one call."""
    if not _call(node, (torch.cat,)) or (node.args[1:], dict(node.kwargs)) not in (((), {"dim": -1}), ((-1,), {})):
        return
    if (
        not isinstance(node.args[0], list | tuple)
        or len(node.args[0]) != 2
        or not _call(node.args[0][0], (operator.neg, torch.neg), "neg")
    ):
        return
    minus, left = node.args[0]
    right = minus.args[0]
    if not _call(left, (operator.getitem,)) or not _call(right, (operator.getitem,)):
        return
    x, value = left.args[0], _computed(left.args[0])
    width = sizes_of(value)[-1] if value is not None and value.dim() else None
    if not isinstance(width, int) or width % 2 or right.args[0] is not x:
        return
    if left.args[1] not in ((..., slice(None, width // 2)), (..., slice(0, width // 2))):
        return
    if right.args[1] not in ((..., slice(width // 2, None)), (..., slice(width // 2, width))):
        return
    turned = _only_reader(node)
    result = _only_reader(turned)
    if not _call(turned, _MUL) or not _call(result, _ADD) or result.kwargs:
        return
    straight: Any = next((a for a in result.args if a is not turned), None)
    if not _call(straight, _MUL) or len(straight.users) != 1 or not _alike(straight, result):
        return
    cos = [a for a in straight.args if a is not x]
    sin = [a for a in turned.args if a is not node]
    if len(cos) != 1 or len(sin) != 1 or _value(cos[0]) is None or not _ends_in(sin[0], width):
        return
    if _written_between(right if right < left else left, result) or _written_between(straight, result):
        return
    if sizes_of(result.meta["example_value"]) == sizes_of(x.meta["example_value"]):
        parts = [straight, turned, node, minus, left, right]
        _replace(graph, result, rotate, x, cos[0], sin[0], parts=parts)


def _ends_in(node: Any, width: int) -> bool:
    value = _value(node)
    return value is not None and value.dim() > 0 and sizes_of(value)[-1] == width


def _products(graph: fx.Graph, node: Any) -> None:
    """Products with a matrix, by `linear`."""
    if _computed(node) is None or not torch.backends.mkldnn.is_available() or not torch._C._get_mkldnn_enabled():
        return
    bias, by_columns = None, False
    if _call(node, _LINEAR) and 2 <= len(node.args) <= 3 and not node.kwargs.keys() - {"bias"}:
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) == 3 else node.kwargs.get("bias")
    elif _call(node, _ADDMM) and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
        by_columns = True
    elif _call(node, _MATMUL, "matmul") and len(node.args) == 2 and not node.kwargs:
        x, weight = node.args
        by_columns = True
    else:
        return
    left, right, shift = _value(x), _value(weight), _value(bias)
    if left is None or right is None or left.dim() < 2 or right.dim() != 2:
        return
    if bias is not None and (shift is None or sizes_of(shift) != (sizes_of(right)[int(by_columns)],)):
        return
    if by_columns:
        with graph.inserting_before(node):
            weight = graph.call_method("t", (weight,))
    _replace(graph, node, linear, x, weight, bias, parts=())


_FRESH = {rms_norm, rotate, linear, torch.rsqrt, torch.cat, operator.neg, F.gelu, _nn.gelu}
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_ADD, torch.Tensor.add_),
    **dict.fromkeys(_MUL, torch.Tensor.mul_),
    **dict.fromkeys((operator.sub, torch.sub), torch.Tensor.sub_),
    **dict.fromkeys((operator.truediv, torch.div), torch.Tensor.div_),
    **dict.fromkeys((F.silu, _nn.silu), _nn.silu_),
    F.relu: torch.relu_,
    torch.relu: torch.relu_,
    torch.sigmoid: torch.sigmoid_,
    torch.tanh: torch.tanh_,
}
_WRITES = set(_IN_PLACE.values())


def _overwrites(graph: fx.Graph, node: Any) -> None:
    """What was computed for this node alone holds its result."""
    if node.op != "call_function" or node.target not in _IN_PLACE or _computed(node) is None:
        return
    if node.kwargs and dict(node.kwargs) != {"inplace": False}:
        return
    swaps = node.target in (*_ADD, *_MUL)
    for place, operand in enumerate(node.args[: 2 if swaps else 1]):
        if _owned(operand) and _alike(operand, node):
            others = [a for i, a in enumerate(node.args) if i != place]
            _replace(graph, node, _IN_PLACE[node.target], operand, *others, parts=())
            return


def _owned(node: Any) -> bool:
    """Whether a value is new memory that one node reads, once."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) != 1:
        return False
    if list(next(iter(node.users)).args).count(node) != 1:
        return False
    return node.target in _FRESH or node.target in _IN_PLACE or node.target in _WRITES
