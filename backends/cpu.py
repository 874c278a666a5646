"""Programs for a CPU as library calls: nothing is traced, weights may be held in oneDNN's order, masks are made once.

What follows a product, an activation or a sum or product with another tensor, is computed within it. An attention
asks first whether there is any padding: without, it needs no mask. Only float32 is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.backends.index import sizes_of
from graphopt.backends.library import attend, gain_norm, product, product_with, rotate, visible
from graphopt.ir.program import Program, specialise
from graphopt.ir.run import fastest

aten, ops = torch.ops.aten, torch.ops.graphopt
# Elements of a weight from which on its products are faster packed, for one row, too.
PACKED = 1 << 17

_UNARY = {
    aten.silu.default: "swish",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
_BINARY = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}


def library_graph(program: Program, dtype: torch.dtype, packing: bool) -> tuple[fx.GraphModule, dict[str, bool]]:
    """The graph of a program as calls for a run in `dtype`, and the weights that it takes packed, turned ones as true."""
    module = fastest(program, dtype, "cpu")
    if dtype != torch.float32:
        return module, {}
    rewriter = _Rewriter(module.graph, program.dtype, packing)
    for rewrite in (rewriter.norm, rewriter.rotation, rewriter.attention, rewriter.product):
        for node in list(module.graph.nodes):
            if not node._erased and node.op == "call_function":
                rewrite(node)
    module.recompile()
    return module, rewriter.packed


class _Rewriter:
    """Rewrites of one graph; `packed` collects the weights whose only reader takes them packed."""

    def __init__(self, graph: fx.Graph, model: torch.dtype, packing: bool) -> None:
        self.graph, self.model = graph, model
        self.products = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
        self.packing = packing
        self.packed: dict[str, bool] = {}
        self._seen: dict[Any, fx.Node] = {}

    def _value(self, node: Any) -> torch.Tensor | None:
        """The fake value of what is float32 in the run; None for all else."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            return None
        kind = specialise(value.dtype, model=self.model, target=torch.float32, device="cpu")
        return value if kind == torch.float32 else None

    def _replace(self, node: fx.Node, function: Callable[..., Any], *args: Any) -> fx.Node:
        with self.graph.inserting_before(node):
            made = self.graph.call_function(function, args)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return made

    def norm(self, node: fx.Node) -> None:
        """RMS norms without a wide copy."""
        if node.target is ops.rms_norm.default and self._value(node.args[0]) is not None:
            x, weight, eps = node.args[:3]
            if weight is None or self._value(weight) is not None:
                self._replace(node, gain_norm, x, eps, weight)

    def rotation(self, node: fx.Node) -> None:
        """Rotary embedding of whole heads without a turned copy."""
        if node.target is not ops.rotary.default or node.args[3]:
            return
        values = [self._value(argument) for argument in node.args[:3]]
        if any(value is None for value in values):
            return
        x, cos, sin = (sizes_of(value) for value in values if value is not None)
        if x[-1] == cos[-1] == sin[-1] and isinstance(x[-1], int) and x[-1] % 2 == 0:
            self._replace(node, rotate, *node.args[:3])

    def attention(self, node: fx.Node) -> None:
        """One mask for all attentions that see alike, and none where there is no padding."""
        if node.target is not ops.attention.default:
            return
        q, k, v, mask, sinks, scale, causal, window, softcap = node.args
        if sinks is not None or softcap is not None or any(self._value(each) is None for each in (q, k, v)):
            return
        if mask is not None and mask.meta["val"].dim() != 2:  # type: ignore[union-attr]
            return
        queries, keys = (sizes_of(each.meta["val"])[2] for each in (q, k))  # type: ignore[union-attr]
        key = (mask, queries, keys, causal, window)
        if key not in self._seen:
            with self.graph.inserting_before(node):
                sizes = [self.graph.call_function(aten.sym_size.int, (each, 2)) for each in (q, k)]
                self._seen[key] = self.graph.call_function(visible, (mask, *sizes, causal, window))
        self._replace(node, attend, q, k, v, self._seen[key], scale, causal)

    def product(self, node: fx.Node) -> None:
        """Products with a matrix, with what follows them."""
        turned = False
        if not self.products or node.kwargs:
            return
        if node.target is aten.linear.default:
            x, weight, bias = (*node.args, None)[:3]
        elif node.target is aten.addmm.default:
            bias, x, weight = node.args
            turned = True
        elif node.target in (aten.mm.default, aten.matmul.default):
            (x, weight), bias = node.args, None
            turned = True
        else:
            return
        values = [self._value(each) for each in (node, x, weight)]
        if any(value is None for value in values) or (bias is not None and self._value(bias) is None):
            return
        if values[1].dim() < 2 or values[2].dim() != 2:  # type: ignore[union-attr]
            return
        if bias is not None and bias.meta["val"].dim() != 1:  # type: ignore[union-attr]
            return
        if self._packs(weight):
            self.packed[weight.meta["weight"]] = turned  # type: ignore[union-attr]
        elif turned:
            with self.graph.inserting_before(node):
                meta, weight = weight.meta, self.graph.call_function(aten.t.default, (weight,))  # type: ignore[union-attr]
                weight.meta["val"] = meta["val"].t()
        self._with_next(node, x, weight, bias)

    def _packs(self, weight: Any) -> bool:
        """Whether a weight is large, this program's own and read once."""
        if not self.packing or "weight" not in weight.meta or len(weight.users) != 1:
            return False
        out, inner = weight.meta["val"].shape
        return int(out) * int(inner) >= PACKED

    def _with_next(self, node: fx.Node, x: Any, weight: Any, bias: Any) -> None:
        """Put a product in the place of `node`, or of its only reader where oneDNN computes that, too."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        target = reader.target if reader is not None else None
        if reader is None or reader.kwargs.keys() - {"approximate"} or self._value(reader) is None:
            self._replace(node, product, x, weight, bias)
        elif target in _UNARY:
            self._replace(reader, product, x, weight, bias, _UNARY[target])
            self.graph.erase_node(node)
        elif target is aten.gelu.default:
            self._replace(reader, product, x, weight, bias, "gelu", reader.kwargs.get("approximate", "none"))
            self.graph.erase_node(node)
        elif target in _BINARY and self._alike(node, *reader.args[:2]):
            (other,) = [argument for argument in reader.args if argument is not node]
            self._replace(reader, product_with, x, weight, bias, other, _BINARY[target])
            self.graph.erase_node(node)
        else:
            self._replace(node, product, x, weight, bias)

    def _alike(self, node: fx.Node, *operands: Any) -> bool:
        """Whether two different operands have the sizes of `node`."""
        if operands[0] is operands[1]:
            return False
        values = [self._value(each) for each in operands]
        return all(value is not None and sizes_of(value) == sizes_of(node.meta["val"]) for value in values)
