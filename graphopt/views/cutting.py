"""Cutting: slice every weight that a set of leaves runs through, and every size that the graph spells out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Affine, Expr, Take
from graphopt.views.atoms import Atom, Axis, Keep, find, flat, indices, kept_size, leaves
from graphopt.views.labels import Labels
from graphopt.views.sizes import slice_bounds

aten = torch.ops.aten


def cut(rewriter: Rewriter, labels: Labels, keep: Mapping[Atom, Keep]) -> None:
    """Keep only the given indices of some leaves, everywhere they occur.

    Norms that average over a cut leaf are folded exactly for RMSNorm: the gain times sqrt(d / d') *and* eps times d / d'
    give what the uncut norm gives on a stream whose cut entries are zero. Raises PlanError for a locked leaf and for
    LayerNorm, which has no such fold.
    """
    keep = {find(atom): chosen for atom, chosen in keep.items()}
    for atom in keep:
        reasons = labels.locks.get(atom, [])
        if reasons:
            raise PlanError.of(
                "locked", f"an axis of {atom.size} cannot be cut: {reasons[0]}", notes=tuple(reasons[1:4])
            )
    cutter = _Cutter(rewriter, labels, keep)
    for name, axes in labels.weight_axes.items():
        cutter.cut_weight(name, axes)
    for node in labels.program.graph.graph.nodes:
        if node.op == "call_function":
            cutter.fix_sizes(node)
    for node, axis in labels.norms.items():
        cutter.fold_norm(node, axis)


def spell_sizes(rewriter: Rewriter, labels: Labels, keep: Mapping[Atom, Keep]) -> None:
    """Write the sizes that leaves with other numbers of entries have wherever the graph spells them out.

    Weights and norms are the caller's: unlike a cut, a table may repeat indices, so that a leaf grows.
    """
    cutter = _Cutter(rewriter, labels, {find(atom): chosen for atom, chosen in keep.items()})
    for node in labels.program.graph.graph.nodes:
        if node.op == "call_function":
            cutter.fix_sizes(node)


class _Cutter:
    def __init__(self, rewriter: Rewriter, labels: Labels, keep: Mapping[Atom, Keep]) -> None:
        self.rewriter = rewriter
        self.labels = labels
        self.keep = keep
        self.scaled: set[str] = set()

    def touched(self, axis: Axis) -> bool:
        return any(leaf in self.keep for leaf in leaves(axis))

    def kept(self, axis: Axis) -> np.ndarray[Any, Any]:
        return indices(axis, self.keep)

    def cut_weight(self, name: str, axes: list[Axis]) -> None:
        for position, axis in enumerate(axes):
            if self.touched(axis):
                index = tuple(int(i) for i in self.kept(axis))
                self.rewriter.set_weight(name, lambda expr, p=position, i=index: Take(expr, p, i))  # type: ignore[misc]

    def fix_sizes(self, node: fx.Node) -> None:
        axes = self.labels.axes.get(node)
        if not axes:
            return
        today = self.rewriter.node(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.split, aten.split_with_sizes, aten.chunk):
            self._fix_split(node, today)
        elif packet is aten.slice:
            self._fix_slice(node, today)
        elif packet is aten.layer_norm:
            if self.touched(axes[-1]):
                today.args = (today.args[0], [kept_size(axes[-1], self.keep)], *today.args[2:])
        elif packet is aten.unflatten:
            dim = node.args[1] % len(self.labels.of(node.args[0]))  # type: ignore[operator,arg-type]
            sizes = [self._size(axes[dim + i], old) for i, old in enumerate(node.args[2])]  # type: ignore[arg-type]
            today.args = (today.args[0], today.args[1], sizes)
        elif node in self.labels.filters:
            if self.touched(axes[1]):
                today.args = (*today.args[:6], kept_size(axes[1], self.keep))
        elif packet is aten.repeat:
            self._fix_repeat(node, today, axes)
        elif packet is aten.repeat_interleave or isinstance(axes[0], list):
            return
        else:
            self._fix_shape_list(node, today, axes)

    def _size(self, axis: Axis, old: Any) -> Any:
        if not isinstance(old, int) or old in (-1, 1) or not self.touched(axis):
            return old
        return kept_size(axis, self.keep)

    def _fix_shape_list(self, node: fx.Node, today: fx.Node, axes: list[Axis]) -> None:
        """Rewrite the one list argument that spells the result's shape, where an op has one."""
        value = node.meta["val"]
        if node.target is operator.getitem or not isinstance(value, torch.Tensor):
            return
        for position, (schema, argument) in enumerate(
            zip(getattr(node.target, "_schema").arguments, node.args, strict=False)  # noqa: B009
        ):
            named = schema.name in ("size", "shape")
            if named and isinstance(argument, list | tuple) and len(argument) == len(axes):
                for axis, size in zip(axes, argument, strict=True):
                    if isinstance(size, fx.Node) and self.touched(axis):
                        raise PlanError.of(
                            "symbolic_size",
                            f"%{size.name} computes a size from a dimension to cut and a symbolic one together",
                            notes=(f"at {node.meta.get('path', node.name)}, %{node.name}",),
                            help=("put `use: cleanup` before this step: it undoes such reshapes where it can",),
                        )
                sizes = [self._size(axis, old) for axis, old in zip(axes, argument, strict=True)]
                arguments = list(today.args)
                arguments[position] = [
                    new if isinstance(new, int) else current
                    for new, current in zip(sizes, today.args[position], strict=True)  # type: ignore[arg-type]
                ]
                today.args = tuple(arguments)

    def _fix_split(self, node: fx.Node, today: fx.Node) -> None:
        groups = self.labels.axes[node]
        source = self.labels.of(node.args[0])  # type: ignore[arg-type]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        dim = dim % len(source)  # type: ignore[operator]
        if not self.touched(source[dim]):
            return
        sizes = [len(self.kept(axes[dim])) for axes in groups]
        today.target = aten.split_with_sizes.default
        today.args = (today.args[0], sizes, dim)
        today.kwargs = {}

    def _fix_repeat(self, node: fx.Node, today: fx.Node, axes: list[Axis]) -> None:
        source = self.labels.of(node.args[0])  # type: ignore[arg-type]
        counts = list(today.args[1])  # type: ignore[arg-type]
        source = [()] * (len(counts) - len(source)) + source
        for position, (axis, before) in enumerate(zip(axes, source, strict=True)):
            if isinstance(counts[position], int) and counts[position] > 1 and self.touched(axis):
                counts[position] = kept_size(axis, self.keep) // kept_size(before, self.keep)
        today.args = (today.args[0], counts)

    def _fix_slice(self, node: fx.Node, today: fx.Node) -> None:
        source = self.labels.of(node.args[0])  # type: ignore[arg-type]
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)  # type: ignore[operator]
        if any(not isinstance(f, Atom) for f in flat(source[dim])) or not self.touched(source[dim]):
            return
        size = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
        if len(node.args) > 4 and node.args[4] != 1:
            # Every n-th entry up to the end: rows of n entries go whole, so that only the end may have to move.
            today.args = (today.args[0], dim, node.args[2], 1 << 62, node.args[4])
            return
        bounds = slice_bounds(node, size)
        if bounds is None:
            return
        kept = self.kept(source[dim])
        start, end = int((kept < bounds[0]).sum()), int((kept < bounds[1]).sum())
        today.args = (today.args[0], dim, start, end)

    def fold_norm(self, node: fx.Node, axis: Axis) -> None:
        if not self.touched(axis):
            return
        before, after = 1, len(self.kept(axis))
        for factor in flat(axis):
            before *= find(factor).size if isinstance(factor, Atom) else 1
        today = self.rewriter.node(node)
        if node.target is not torch.ops.graphopt.rms_norm.default:
            raise PlanError.of(
                "layer_norm_fold",
                f"the LayerNorm at {node.meta.get('path', node.name)} averages over the axis to cut, and has no exact fold",
                help=("prune heads, neurons or layers of this model instead",),
            )
        x, weight, eps, in_float = today.args
        if weight is None:
            raise PlanError.of(
                "norm_without_gain",
                f"the norm at {node.meta.get('path', node.name)} has no gain to fold sqrt(d / d') into",
            )
        scale = float(np.sqrt(before / after))
        self._scale_gain(weight, scale)  # type: ignore[arg-type]
        today.args = (x, weight, float(eps) * before / after, in_float)  # type: ignore[arg-type]

    def _scale_gain(self, gain: fx.Node, scale: float) -> None:
        """Scale a norm's effective gain: the weight itself, or the w in 1 + w (Gemma)."""
        shift = 0.0
        node = gain
        while "weight" not in node.meta:
            packet = getattr(node.target, "overloadpacket", None)
            if packet is aten.to:
                node = node.args[0]  # type: ignore[assignment]
            elif packet is aten.add:
                numbers = [a for a in node.args if isinstance(a, int | float)]
                nodes = [a for a in node.args if isinstance(a, fx.Node)]
                if len(numbers) != 1 or len(nodes) != 1:
                    raise PlanError.of("gain_shape", f"the gain at %{gain.name} is no weight plus a number")
                shift += float(numbers[0])
                node = nodes[0]
            else:
                raise PlanError.of("gain_shape", f"the gain at %{gain.name} is computed by {node.target}")

        def change(expr: Expr) -> Expr:
            return Affine(expr, scale, shift * scale - shift)

        # Layers that share their weights share the gain: one weight, scaled once.
        if node.meta["weight"] not in self.scaled:
            self.scaled.add(node.meta["weight"])
            self.rewriter.set_weight(node.meta["weight"], change)
