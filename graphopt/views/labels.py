"""Label propagation: the axes of every node of a program, found op by op from shapes and schemas alone."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.views.atoms import Atom, Axis, Choice, LockedLeaves, lock, size_of, split_sum, unify
from graphopt.views.layouts import Axes
from graphopt.views.routing import Linear, RoutingRules
from graphopt.views.sizes import Rank, every, flatten, op_name

aten = torch.ops.aten


class Labels(RoutingRules):
    """Axes of all nodes of a program, its matrix products and its norms.

    `axes[node]` is a list of axes, or a list of such lists for nodes with several outputs; nodes that are numbers have
    none. `filters` are convolutions that filter each channel for itself. `locks` says for each leaf why it must not be
    cut; unlocked leaves are free.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.axes: dict[fx.Node, Any] = {}
        self.linears: dict[fx.Node, Linear] = {}
        self.bank_linears: dict[fx.Node, Linear] = {}
        self.numbers: dict[fx.Node, Axis] = {}
        self.choices: dict[fx.Node, int] = {}
        self._gathered = {}
        self.norms: dict[fx.Node, Axis] = {}
        self.filters: set[fx.Node] = set()
        self.weight_axes: dict[str, Axes] = {}
        for node in program.graph.graph.nodes:
            self._visit(node)
        locked = LockedLeaves()
        for axes in self.axes.values():
            for axis in every(axes):
                locked.visit(axis)
        self.locks: dict[Atom, list[str]] = locked.reasons
        # Experts may go although a router shares out and chooses among them: what is not there has no share.
        for leaf in self.experts():
            self.locks[leaf] = [reason for reason in self.locks.get(leaf, []) if not isinstance(reason, Choice)]

    def _visit(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            axes = self._fresh(value)
            self.axes[node] = axes
            if "weight" in node.meta:
                self.weight_axes[node.meta["weight"]] = axes
            else:
                for axis in axes:
                    lock(axis, f"input {node.name!r} has this size")
            return
        if node.op == "output":
            for result in self.program.output_nodes:
                for axis in self.of(result):
                    lock(axis, "it is the size of a result")
            return
        if not isinstance(value, torch.Tensor | tuple | list):
            return
        handler = self._handler(node)
        if handler is None or not self._try(handler, node):
            self._unknown(node)
        self._follow(node)

    def _try(self, handler: Callable[[fx.Node], Any], node: fx.Node) -> bool:
        result = handler(node)
        if result is None:
            return False
        self.axes[node] = result
        return True

    def _handler(self, node: fx.Node) -> Callable[[fx.Node], Any] | None:
        target = node.target
        if target is operator.getitem:
            return self._getitem
        packet = getattr(target, "overloadpacket", None)
        if packet in _HANDLERS:
            return getattr(self, _HANDLERS[packet])  # type: ignore[no-any-return]
        tags = getattr(target, "tags", ())
        if torch.Tag.pointwise in tags:
            return self._pointwise
        return None

    def _unknown(self, node: fx.Node) -> None:
        reason = f"op {op_name(node)} at %{node.name} is not understood"
        for source in node.all_input_nodes:
            for axis in every(self.axes.get(source, [])):
                lock(axis, reason)
        value = node.meta["val"]
        values = value if isinstance(value, tuple | list) else [value]
        made = [self._fresh(v) if isinstance(v, torch.Tensor) else [] for v in values]
        for axes in made:
            for axis in axes:
                lock(axis, reason)
        self.axes[node] = made if isinstance(value, tuple | list) else made[0]

    # -- op handlers ------------------------------------------------------------------------------------------------

    def _getitem(self, node: fx.Node) -> Axes | None:
        source = self.axes.get(node.args[0])  # type: ignore[arg-type]
        if not source or not isinstance(source[0], list):
            return None
        return list(source[node.args[1]])

    def _pointwise(self, node: fx.Node) -> Axes:
        tensors = [a for a in flatten(node.args) + flatten(node.kwargs.values()) if isinstance(a, fx.Node)]
        tensors = [a for a in tensors if isinstance(a.meta.get("val"), torch.Tensor)]
        return self._broadcast([self.of(t) for t in tensors], node.meta["val"], f"%{node.name}")

    def _linear(self, node: fx.Node) -> Axes:
        x, weight, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("bias")
        return self._product(node, x, weight, bias, in_axis=1)  # type: ignore[arg-type]

    def _addmm(self, node: fx.Node) -> Axes:
        bias, x, weight = node.args[:3]
        return self._product(node, x, weight, bias, in_axis=0)  # type: ignore[arg-type]

    def _product(self, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None, in_axis: int) -> Axes:
        ax, aw = self.of(x), self.of(weight)
        unify(ax[-1], aw[in_axis], f"contraction at %{node.name}")
        out = aw[1 - in_axis]
        if bias is not None:
            unify(out, self.of(bias)[-1], f"bias of %{node.name}")
        if "weight" in weight.meta and (bias is None or "weight" in bias.meta):
            self.linears[node] = Linear(
                node, x, weight.meta["weight"], bias.meta["weight"] if bias is not None else None, in_axis, node
            )
        return [*ax[:-1], out]

    def _matmul(self, node: fx.Node) -> Axes | None:
        x, y = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return None
        ax, ay = self.of(x), self.of(y)
        if len(ay) == 2 and "weight" in y.meta:
            return self._product(node, x, y, None, in_axis=0)
        if len(ax) < 2 or len(ay) < 2:
            return None
        unify(ax[-1], ay[-2], f"contraction at %{node.name}")
        if len(ax) == len(ay) == 3:
            self._bank_product(node, x, y)
        batch = self._broadcast([ax[:-2], ay[:-2]], Rank(max(len(ax), len(ay)) - 2), f"%{node.name}")  # type: ignore[arg-type]
        return [*batch, ax[-2], ay[-1]]

    def _baddbmm(self, node: fx.Node) -> Axes:
        base, x, y = node.args[:3]
        ax, ay = self.of(x), self.of(y)  # type: ignore[arg-type]
        unify(ax[-1], ay[-2], f"contraction at %{node.name}")
        made = [*self._broadcast([ax[:1], ay[:1]], Rank(1), f"%{node.name}"), ax[-2], ay[-1]]  # type: ignore[arg-type]
        return self._broadcast([made, self.of(base)], node.meta["val"], f"%{node.name}")  # type: ignore[arg-type]

    def _embedding(self, node: fx.Node) -> Axes:
        weight, ids = node.args[:2]
        axes = self.of(weight)  # type: ignore[arg-type]
        lock(axes[0], "rows are looked up by id")
        return [*self.of(ids), axes[1]]  # type: ignore[arg-type]

    def _masked_scatter(self, node: fx.Node) -> Axes | None:
        """Rows of the source, written in their order where a mask of rows says."""
        x, mask, source = node.args
        axes, rows = self._same(node), self.of(source)  # type: ignore[arg-type]
        if mask.meta["val"].shape[-1] != 1 or x.meta["val"].shape[-1] != source.meta["val"].shape[-1]:  # type: ignore[union-attr]
            return None
        unify(axes[-1], rows[-1], f"rows written at %{node.name}")
        for axis in rows[:-1]:
            lock(axis, f"places are held for its entries at %{node.name}")
        return axes

    def _layer_norm(self, node: fx.Node) -> Axes | None:
        x, sizes = node.args[:2]
        axes = self.of(x)  # type: ignore[arg-type]
        if len(sizes) != 1:  # type: ignore[arg-type]
            return None
        for extra in node.args[2:4]:
            if isinstance(extra, fx.Node):
                unify(axes[-1], self.of(extra)[-1], f"gain of %{node.name}")
        self.norms[node] = axes[-1]
        return list(axes)

    def _rms_norm(self, node: fx.Node) -> Axes:
        x, weight = node.args[:2]
        axes = self.of(x)  # type: ignore[arg-type]
        if isinstance(weight, fx.Node):
            unify(axes[-1], self.of(weight)[-1], f"gain of %{node.name}")
        self.norms[node] = axes[-1]
        return list(axes)

    def _rotary(self, node: fx.Node) -> Axes | None:
        x, cos, sin, interleaved = node.args
        axes, ac, asin = self.of(x), self.of(cos), self.of(sin)  # type: ignore[arg-type]
        where = f"rotary at %{node.name}"
        unify(ac[-1], asin[-1], where)
        width, total = size_of(ac[-1]), size_of(axes[-1])
        turned = axes[-1]
        if width < total:
            pieces = split_sum(axes[-1], [width, total - width], where)
            if pieces is None:
                return None
            turned = pieces[0]
        unify(turned, ac[-1], where)
        if interleaved:
            lock(turned, where)
        else:
            halves = split_sum(turned, [width // 2, width // 2], where)
            if halves is None:
                return None
            unify(halves[0], halves[1], where)
        return list(axes)

    def _attention(self, node: fx.Node) -> Axes:
        q, k, v = node.args[:3]
        cached = node.target is torch.ops.graphopt.cached_attention.default
        packed = node.target is torch.ops.graphopt.packed_attention.default
        admitting = node.target is torch.ops.graphopt.admitting_attention.default
        held = packed or admitting or node.target is torch.ops.graphopt.held_attention.default
        mask, sinks = node.args[8:10] if cached or held else node.args[3:5]
        mask, sinks = None if held else mask, node.args[14] if packed else node.args[8] if admitting else sinks
        aq, ak, av = self.of(q), self.of(k), self.of(v)  # type: ignore[arg-type]
        where = f"attention at %{node.name}"
        unify(ak[1], av[1], where)
        unify(aq[3], ak[3], where)
        if cached or held:
            for axis in (ak[1], ak[3], av[3]):
                lock(axis, f"the cache of the {where} has its size; cut before insert_cache")
        if node.target is torch.ops.graphopt.bounded_attention.default:
            lock(ak[1], f"the policy of the {where} names its KV heads; cut before bound_cache")
        if ak[1] != ():
            heads, kv_heads = size_of(aq[1]), size_of(ak[1])
            grouped: Axis = (*ak[1], Atom(heads // kv_heads)) if heads != kv_heads else ak[1]
            unify(aq[1], grouped, where)
        if isinstance(sinks, fx.Node):
            unify(aq[1], self.of(sinks)[-1], where)
        if isinstance(mask, fx.Node) and len(self.of(mask)) == 4 and self.of(mask)[1] != ():
            unify(aq[1], self.of(mask)[1], where)
        return [aq[0], aq[1], aq[2], av[3]]

    def _attention_mask(self, node: fx.Node) -> Axes:
        return self._fresh(node.meta["val"])

    def _tokens(self, node: fx.Node) -> Axes:
        """Some tokens of a tensor, or some more: every other axis stays what it is."""
        axes, token = self._same(node), node.args[-1]
        made = self._fresh(node.meta["val"])
        for position, axis in enumerate(axes):
            if position not in (0, token):
                made[position] = axis
        lock(axes[token], f"{op_name(node)} at %{node.name} chooses entries of it")  # type: ignore[index]
        return made

    def _reduce(self, node: fx.Node) -> Axes | None:
        axes = self._same(node)
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if dims is None or dims == []:
            return None
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        positions = {d % len(axes) for d in (dims if isinstance(dims, list | tuple) else [dims])}  # type: ignore[operator]
        for position in positions:
            lock(axes[position], f"{op_name(node)} at %{node.name} runs over it")
        return [() if i in positions else axis for i, axis in enumerate(axes) if keep or i not in positions]

    def _vector_norm(self, node: fx.Node) -> Axes | None:
        axes = self._same(node)
        dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        keep = bool(node.args[3]) if len(node.args) > 3 else bool(node.kwargs.get("keepdim", False))
        if not dims:
            return None
        positions = {d % len(axes) for d in (dims if isinstance(dims, list | tuple) else [dims])}  # type: ignore[operator]
        for position in positions:
            lock(axes[position], f"{op_name(node)} at %{node.name} runs over it")
        return [() if i in positions else axis for i, axis in enumerate(axes) if keep or i not in positions]

    def _batch_norm(self, node: fx.Node) -> Axes | None:
        """A scale and a shift for each channel: statistics of the batch are no part of an evaluated model."""
        axes = self._same(node)
        if node.args[5]:
            return None
        for table in node.args[1:5]:
            if isinstance(table, fx.Node):
                unify(axes[1], self.of(table)[0], f"channels of %{node.name}")
        return axes

    def _convolution(self, node: fx.Node) -> Axes | None:
        """A filter for each channel, whose channels are free; one over channels is not understood."""
        if len(node.args) < 7:
            return None
        x, weight, bias, *_, groups = node.args
        axes, filters = self._same(node), self.of(weight)  # type: ignore[arg-type]
        sizes = (x.meta["val"].shape[1], weight.meta["val"].shape[0])  # type: ignore[union-attr]
        if groups == 1 or sizes != (groups, groups):
            return None
        for table in (filters, self.of(bias) if isinstance(bias, fx.Node) else filters):
            unify(axes[1], table[0], f"channels of %{node.name}")
        made = self._fresh(node.meta["val"])
        for axis in (axes[0], *axes[2:], *filters[1:], made[0], *made[2:]):
            lock(axis, f"{op_name(node)} at %{node.name} runs over it")
        self.filters.add(node)
        return [axes[0], axes[1], *made[2:]]

    def _softmax(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        dim = node.args[1] % len(axes)  # type: ignore[operator]
        self.choices[node] = dim
        lock(axes[dim], Choice(f"softmax at %{node.name} runs over it"))
        return axes

    def _cumsum(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        lock(axes[node.args[1]], f"cumsum at %{node.name} runs over it")  # type: ignore[index]
        return axes

    def _triangle(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        for axis in axes[-2:]:
            lock(axis, f"{op_name(node)} at %{node.name} counts along it")
        return axes

    def _factory(self, node: fx.Node) -> Axes:
        made = self._fresh(node.meta["val"])
        if op_name(node) in ("arange", "eye", "linspace"):
            for axis in made:
                lock(axis, f"{op_name(node)} at %{node.name} numbers it; cleanup makes a table of it, which can be cut")
        return made


def _table() -> dict[Any, str]:
    names = {
        "_linear": [aten.linear],
        "_addmm": [aten.addmm],
        "_matmul": [aten.matmul, aten.mm, aten.bmm],
        "_baddbmm": [aten.baddbmm],
        "_embedding": [aten.embedding],
        "_top_k": [aten.topk, aten.sort],
        "_arg_top": [aten.argmax, aten.argmin, aten.argsort],
        "_gather": [aten.gather],
        "_scatter": [aten.scatter],
        "_index": [aten.index],
        "_one_hot": [aten.one_hot],
        "_expand_as": [aten.expand_as],
        "_view": [
            aten.view,
            aten.reshape,
            aten._unsafe_view,
            aten.flatten,
            aten.unflatten,
            aten.view_as,
            aten.reshape_as,
        ],
        "_transpose": [aten.transpose, aten.t, aten.swapaxes, aten.mT, aten.numpy_T],
        "_permute": [aten.permute],
        "_unsqueeze": [aten.unsqueeze],
        "_squeeze": [aten.squeeze],
        "_expand": [aten.expand],
        "_repeat_interleave": [aten.repeat_interleave],
        "_repeat": [aten.repeat],
        "_cat": [aten.cat, aten.concat],
        "_stack": [aten.stack],
        "_split": [aten.split, aten.split_with_sizes, aten.chunk],
        "_unbind": [aten.unbind],
        "_masked_scatter": [aten.masked_scatter],
        "_select": [aten.select],
        "_slice": [aten.slice],
        "_layer_norm": [aten.layer_norm],
        "_rms_norm": [torch.ops.graphopt.rms_norm],
        "_rotary": [torch.ops.graphopt.rotary],
        "_attention": [
            torch.ops.graphopt.admitted_attention,
            torch.ops.graphopt.admitting_attention,
            torch.ops.graphopt.attention,
            torch.ops.graphopt.bounded_attention,
            torch.ops.graphopt.cached_attention,
            torch.ops.graphopt.held_attention,
            torch.ops.graphopt.packed_attention,
            torch.ops.graphopt.quantised_attention,
        ],
        "_attention_mask": [
            torch.ops.graphopt.attention_mask,
            torch.ops.graphopt.pair_scores,
            torch.ops.graphopt.random_scores,
            torch.ops.graphopt.received_attention,
            torch.ops.graphopt.similarity_scores,
            torch.ops.graphopt.token_index,
            torch.ops.graphopt.admit_tokens,
            torch.ops.graphopt.top_tokens,
            torch.ops.graphopt.window_scores,
        ],
        "_tokens": [torch.ops.graphopt.take_tokens, torch.ops.graphopt.put_tokens],
        "_reduce": [aten.mean, aten.sum, aten.amax, aten.amin, aten.var],
        "_vector_norm": [aten.linalg_vector_norm],
        "_batch_norm": [aten.batch_norm],
        "_convolution": [aten.conv1d, aten.conv2d],
        "_softmax": [aten.softmax, aten._softmax, aten.log_softmax],
        "_cumsum": [aten.cumsum],
        "_triangle": [aten.tril, aten.triu],
        "_factory": [
            aten.arange,
            aten.linspace,
            aten.zeros,
            aten.ones,
            aten.full,
            aten.empty,
            aten.scalar_tensor,
            aten.eye,
        ],
        "_same": [
            aten.contiguous,
            aten.clone,
            aten.to,
            aten.alias,
            aten.dropout,
            aten.zeros_like,
            aten.ones_like,
            aten.full_like,
            aten.type_as,
            torch.ops.graphopt.merge_tokens,
            torch.ops.graphopt.merge_windows,
        ],
        "_pointwise": [
            aten.where,
            aten.masked_fill,
            aten.add,
            aten.sub,
            aten.mul,
            aten.div,
            aten.pow,
            aten.square,
            aten.gelu,
            aten.silu,
            aten.relu,
            aten.sigmoid,
            aten.tanh,
            aten.softplus,
            aten.hardswish,
            aten.hardsigmoid,
            aten.multiply,
        ],
    }
    return {packet: name for name, packets in names.items() for packet in packets}


_HANDLERS = _table()
