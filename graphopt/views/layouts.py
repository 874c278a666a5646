"""How layout operations carry labels: views, transposes, cats, splits and slices move factors and never mix them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.views.atoms import Atom, Axis, Dyn, flat, lock, size_of, split_product, split_sum, unify
from graphopt.views.sizes import Rank, consume, slice_bounds

Axes = list[Axis]


class LayoutRules:
    """Rules for operations that rearrange; each returns the result's axes, or None for what it does not understand."""

    axes: dict[fx.Node, Any]

    def of(self, node: fx.Node) -> Axes:
        """The axes of a node with one tensor result."""
        found: Axes = self.axes[node]
        return found

    def _fresh(self, value: torch.Tensor) -> Axes:
        return [
            (Dyn(size.node.expr),) if not isinstance(size, int) else () if size == 1 else (Atom(size),)
            for size in value.shape
        ]

    def _same(self, node: fx.Node) -> Axes:
        return list(self.of(node.args[0]))  # type: ignore[arg-type]

    def _broadcast(self, operands: list[Axes], value: torch.Tensor, where: str) -> Axes:
        result: Axes = []
        rank = value.dim()
        for i in range(rank):
            chosen: Axis | None = None
            for axes in operands:
                j = i - (rank - len(axes))
                if j < 0 or axes[j] == ():
                    continue
                if chosen is None:
                    chosen = axes[j]
                else:
                    unify(chosen, axes[j], f"operands of {where}")
            result.append(chosen if chosen is not None else ())
        return result

    def _view(self, node: fx.Node) -> Axes | None:
        return self._reshape(self.of(node.args[0]), node.meta["val"].shape, f"%{node.name}")  # type: ignore[arg-type]

    def _reshape(self, source: Axes, shape: Any, where: str) -> Axes | None:
        tokens: list[Atom | Dyn] = [factor for axis in source for factor in flat(axis)]
        result: Axes = []
        for size in shape:
            taken = consume(tokens, size if isinstance(size, int) else size.node.expr, f"view at {where}")
            if taken is None:
                return None
            result.append(taken)
        return result if not tokens else None

    def _transpose(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        i, j = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1) if len(axes) == 2 else (-1, -2)
        axes[i], axes[j] = axes[j], axes[i]  # type: ignore[index]
        return axes

    def _permute(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        return [axes[i] for i in node.args[1]]  # type: ignore[union-attr,index,misc]

    def _unsqueeze(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        position = node.args[1]
        axes.insert(position if position >= 0 else position + len(axes) + 1, ())  # type: ignore[operator,arg-type]
        return axes

    def _squeeze(self, node: fx.Node) -> Axes | None:
        axes = self._same(node)
        if len(node.args) < 2:
            return [axis for axis in axes if axis != ()]
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
        drop = {d % len(axes) for d in dims if axes[d] == ()}  # type: ignore[operator,index]
        return [axis for i, axis in enumerate(axes) if i not in drop]

    def _expand(self, node: fx.Node) -> Axes:
        axes = self._same(node)
        fresh = self._fresh(node.meta["val"])
        padded: Axes = [()] * (len(fresh) - len(axes)) + axes
        return [old if old != () else new for old, new in zip(padded, fresh, strict=True)]

    def _expand_as(self, node: fx.Node) -> Axes:
        return self._broadcast([self.of(a) for a in node.args], node.meta["val"], f"%{node.name}")  # type: ignore[arg-type]

    def _repeat_interleave(self, node: fx.Node) -> Axes | None:
        if len(node.args) < 3 or not isinstance(node.args[1], int) or not isinstance(node.args[2], int):
            return None
        axes = self._same(node)
        if node.args[1] > 1:
            axes[node.args[2]] = (*axes[node.args[2]], Atom(node.args[1]))
        return axes

    def _repeat(self, node: fx.Node) -> Axes | None:
        axes = self._same(node)
        counts = node.args[1]
        padded: Axes = [()] * (len(counts) - len(axes)) + axes  # type: ignore[arg-type]
        made: Axes = []
        for count, axis, size in zip(counts, padded, node.meta["val"].shape, strict=True):  # type: ignore[arg-type]
            if not isinstance(count, int):
                made.append((Dyn(size.node.expr),) if not isinstance(size, int) else axis)
            else:
                made.append(axis if count == 1 else (Atom(count), *axis))
        return made

    def _cat(self, node: fx.Node) -> Axes | None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        # A rotary width equal to the head size leaves an empty rest behind: it joins nothing.
        sources = [s for s in node.args[0] if not _empty(s.meta["val"].shape[dim])]  # type: ignore[union-attr,index]
        operands = [self.of(s) for s in sources]  # type: ignore[arg-type]
        rank = node.meta["val"].dim()
        dim = dim % rank  # type: ignore[operator]
        result = self._broadcast(
            [[*axes[:dim], (), *axes[dim + 1 :]] for axes in operands], node.meta["val"], f"%{node.name}"
        )
        size = node.meta["val"].shape[dim]
        if not isinstance(size, int):
            result[dim] = (Dyn(size.node.expr),)
            return result
        pieces: list[Axis] = [axes[dim] if axes[dim] != () else (Atom(1),) for axes in operands]
        joined = Atom(size)
        bounds = split_sum((joined,), [size_of(piece) for piece in pieces], f"cat at %{node.name}")
        assert bounds is not None
        for bound, piece in zip(bounds, pieces, strict=True):
            unify(bound, piece, f"cat at %{node.name}")
        result[dim] = (joined,)
        return result

    def _stack(self, node: fx.Node) -> Axes:
        sources = [self.of(s) for s in node.args[0]]  # type: ignore[union-attr,arg-type]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        rank = node.meta["val"].dim()
        merged = self._broadcast(sources, Rank(rank - 1), f"%{node.name}")  # type: ignore[arg-type]
        atom = Atom(len(sources))
        lock((atom,), f"stacked at %{node.name}")
        merged.insert(dim % rank, (atom,))  # type: ignore[operator]
        return merged

    def _split(self, node: fx.Node) -> list[Axes] | None:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        source = self.of(node.args[0])  # type: ignore[arg-type]
        dim = dim % len(source)  # type: ignore[operator]
        sizes = [value.shape[dim] for value in node.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            return None
        pieces = split_sum(source[dim], sizes, f"split at %{node.name}")
        if pieces is None:
            return None
        return [[*source[:dim], piece, *source[dim + 1 :]] for piece in pieces]

    def _unbind(self, node: fx.Node) -> list[Axes] | None:
        source = self.of(node.args[0])  # type: ignore[arg-type]
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(source)  # type: ignore[operator]
        lock(source[dim], f"unbound at %{node.name}")
        return [[*source[:dim], *source[dim + 1 :]] for _ in node.meta["val"]]

    def _select(self, node: fx.Node) -> Axes:
        source = self._same(node)
        dim = node.args[1] % len(source)  # type: ignore[operator]
        lock(source[dim], f"one index is selected at %{node.name}")
        return [*source[:dim], *source[dim + 1 :]]

    def _slice(self, node: fx.Node) -> Axes | None:
        source = self._same(node)
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)  # type: ignore[operator]
        size = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
        step = node.args[4] if len(node.args) > 4 else 1
        new = node.meta["val"].shape[dim]
        if not isinstance(size, int):
            source[dim] = (Dyn(new.node.expr),) if not isinstance(new, int) else self._fresh(node.meta["val"])[dim]
            return source
        if not isinstance(new, int):
            return None
        if new == size and step == 1:
            return source
        if step != 1:
            source[dim] = self._every(source[dim], size, step, node)
            return source if source[dim] else None
        bounds = slice_bounds(node, size)
        if bounds is None:
            return None
        start, end = bounds
        if start == end:
            source[dim] = self._fresh(node.meta["val"])[dim]
            return source
        sizes = [n for n in (start, end - start, size - end) if n]
        pieces = split_sum(source[dim], sizes, f"slice at %{node.name}")
        if pieces is None:
            return None
        source[dim] = pieces[1 if start else 0]
        return source

    def _every(self, axis: Axis, size: int, step: Any, node: fx.Node) -> Axis:
        """Every `step`-th entry of an axis: all rows of `step` entries, one entry of each; () when it does not fit."""
        start = node.args[2] or 0
        end = node.args[3] if node.args[3] is not None else size
        factors = flat(axis)
        if not factors:
            return ()
        last = factors[-1]
        whole = isinstance(start, int) and isinstance(end, int) and 0 <= start < step and end >= size
        if not whole or not isinstance(last, Atom) or last.size % step:
            return ()
        if last.size == step:
            lock((last,), f"one of {step} is taken at %{node.name}")
            return tuple(factors[:-1])
        halves = split_product(last, last.size // step, f"slice at %{node.name}")
        if halves is None:
            return ()
        lock((halves[1],), f"one of {step} is taken at %{node.name}")
        return (*factors[:-1], halves[0])


def _empty(size: Any) -> bool:
    return isinstance(size, int) and size == 0
