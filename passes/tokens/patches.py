"""Where a graph embeds the patches of a picture, and the edit that changes their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import BlockMap, Const, Expr, Take
from graphopt.passkit.edits import Edit
from graphopt.views import Atom, Axis, Keep, Labels, Views, coordinates, find, indices, leaves, spell_sizes
from graphopt.views.sizes import op_name

aten = torch.ops.aten


class Unfit(Exception):
    """A candidate that is declined, with the reason."""


@dataclass(frozen=True)
class Patches:
    """A convolution that embeds patches: their side and the picture's `(height, width)`, in pixels."""

    node: fx.Node
    path: str
    size: int
    picture: tuple[int, int]


@dataclass(frozen=True)
class Positions:
    """What is added to the patches: `axis` of the weight `table`, counted by the patches as `labels` say.

    `node` reads the table, or it is the numbers that look up its `rows`.
    """

    node: fx.Node
    table: str
    axis: int
    labels: Axis
    rows: tuple[int, ...] = ()


def convolutions(program: Program) -> list[fx.Node]:
    """All convolutions over two axes, in graph order."""
    return [node for node in program.graph.graph.nodes if node.target is aten.conv2d.default]


def find_patches(views: Views, node: fx.Node) -> Patches:
    """The patches that a convolution embeds; raises Unfit when it does something else."""
    x, weight, _, stride, padding, dilation, groups = _arguments(node)
    if "weight" not in weight.meta:
        raise Unfit("its kernel is computed")
    rows, columns = weight.meta["val"].shape[2:]
    if list(stride) != [rows, columns] or any(padding) or set(dilation) != {1} or groups != 1:
        raise Unfit("its windows overlap, leave gaps or are padded, so they are no patches")
    if rows != columns:
        raise Unfit(f"its patches are {rows} x {columns} pixels, not square")
    if len(weight.users) != 1:
        raise Unfit("its kernel is used more than once")
    while x.target is aten.to.dtype:
        x = x.args[0]
    height, width = x.meta["val"].shape[2:]
    if "input" not in x.meta or not isinstance(height, int) or not isinstance(width, int):
        raise Unfit("it does not read a picture of fixed size")
    if height % rows or width % rows:
        raise Unfit(f"pictures of {height} x {width} pixels leave a rest beside its patches of {rows}")
    return Patches(node, str(node.meta.get("path") or node.name), rows, (height, width))


@dataclass(frozen=True)
class Repatch(Edit):
    """Let a convolution embed patches of `new` pixels a side instead of `old`, on the same pictures."""

    path: str
    node: str
    old: int
    new: int
    picture: tuple[int, int]
    kernel: str
    positions: str

    @property
    def candidate(self) -> str:
        """The embedding."""
        return self.path

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Patches down and across, before and after."""
        height, width = self.picture
        return (height // self.old, width // self.old), (height // self.new, width // self.new)

    def describe(self) -> str:
        """Sizes and tokens before and after."""
        before, after = (rows * columns for rows, columns in self.grids)
        return f"{self.path}: patches of {self.new} pixels a side for {self.old}, {after} tokens for {before}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "repatch",
            "path": self.path,
            "old": self.old,
            "new": self.new,
            "picture": list(self.picture),
            "kernel": self.kernel,
            "positions": self.positions,
        }

    def check(self, views: Views) -> None:
        """Raise Unfit when something besides positions depends on how many patches there are."""
        for found in self._positions(views):
            self._matrix(views, found)

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Resample the kernel and the positions as weights."""
        kernel = _arguments(rewriter.node(self.node))[1].meta["weight"]
        side = self._picture_map().T.contiguous()
        for axis in (2, 3):
            rewriter.set_weight(kernel, lambda expr, a=axis: _mapped(expr, a, side))  # type: ignore[misc]
        for found in self._positions(views):
            matrix = self._matrix(views, found)
            if found.rows:
                rewriter.set_weight(found.table, lambda expr, p=found: Take(expr, 0, p.rows))  # type: ignore[misc]
            rewriter.set_weight(found.table, lambda expr, a=found.axis, m=matrix: _mapped(expr, a, m))  # type: ignore[misc]
            if found.rows:
                _renumber(rewriter, rewriter.node(found.node), len(matrix))
        self._spell(rewriter, views, self.new)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Resample each patch of the picture for the old kernel, and the positions as they are added."""
        node = rewriter.node(self.node)
        x: fx.Node = node.args[0]  # type: ignore[assignment]
        part, (_, (rows, columns)) = self._picture_map(), self.grids
        maps = {"down": torch.block_diag(*[part] * rows), "across": torch.block_diag(*[part] * columns).T.contiguous()}
        dtype = x.meta["val"].dtype
        down, across = (rewriter.add_weight(f"{k}.{node.name}", Const(m, dtype), "constant") for k, m in maps.items())
        half = rewriter.call(aten.matmul.default, down, x, before=node)
        node.replace_input_with(x, rewriter.call(aten.matmul.default, half, across, before=node))
        for number, found in enumerate(self._positions(views)):
            matrix = self._matrix(views, found)
            for held in [u for u in found.node.users] if found.rows else [found.node]:
                held = rewriter.node(held)
                dtype = held.meta["val"].dtype
                last = found.axis == held.meta["val"].dim() - 1 and not found.rows
                name = f"positions.{number}.{held.name}"
                made = rewriter.add_weight(name, Const(matrix.T.contiguous() if last else matrix, dtype), "constant")
                for user in list(held.users):
                    pair = (held, made) if last else (made, held)
                    user.replace_input_with(held, rewriter.call(aten.matmul.default, *pair, before=user))
        self._spell(rewriter, views, self.old)

    def _picture_map(self) -> torch.Tensor:
        """What takes one side of a new patch to the old size `[old, new]`; its transpose takes kernels the other way."""
        resize = resize_matrix(self.old, self.new, "bilinear")
        return torch.linalg.pinv(resize) if self.kernel == "pseudo_inverse" else resize.T.contiguous()

    def _sides(self, views: Views) -> tuple[Atom, Atom]:
        """The leaves of the grid's two axes."""
        axes = views.labels.axes[_named(views.program, self.node)]
        found = [list(leaves(axis)) for axis in axes[2:]]
        if any(len(side) != 1 for side in found):
            raise Unfit("its patches are grouped on their grid later, which depends on how many there are")
        down, across = find(found[0][0]), find(found[1][0])
        if down is across:
            raise Unfit("rows and columns of its grid of patches meet later")
        return down, across

    def _keep(self, views: Views) -> dict[Atom, Keep]:
        """Both sides of the grid with as many entries as they shall have."""
        sides = zip(self._sides(views), *self.grids, strict=True)
        return {leaf: Keep(np.arange(new) * old // new) for leaf, old, new in sides}

    def _positions(self, views: Views) -> list[Positions]:
        """What is added to the patches; raises Unfit when anything else has one entry a patch."""
        sides, labels = self._sides(views), views.labels
        understood = {f"op conv2d at %{self.node} is not understood", "it is the size of a result"}
        found: list[Positions] = []
        for node in views.program.graph.graph.nodes:
            axes = labels.axes.get(node)
            if not axes or isinstance(axes[0], list):
                continue
            if node.target is aten.select.int and self._selected(views, node) is not None:
                understood.add(f"one index is selected at %{node.name}")
            if node.target is aten.masked_scatter.default:
                understood.add(f"places are held for its entries at %{node.name}")
            if node.target in _OF_ANY_NUMBER:
                understood.add(f"{op_name(node)} at %{node.name} runs over it")
            if node.target in _BY_PLACE:
                _check_operands(labels, node, sides)
            if node.target in _RANGES:
                understood.add(f"{op_name(node)} at %{node.name} numbers it")
            counted = [number for number, axis in enumerate(axes) if _touches(axis, sides)]
            if counted and not node.all_input_nodes:
                if len(counted) > 1:
                    raise Unfit(f"%{node.name} has several axes that are counted by the patches")
                found += _added(views.program, node, counted[0], axes[counted[0]])
        for reason in (reason for side in sides for reason in labels.locks.get(side, [])):
            if not reason.startswith(tuple(understood)):
                raise Unfit(f"how many patches there are cannot change: {reason}")
        return found

    def _selected(self, views: Views, node: fx.Node) -> int | None:
        """Where a selected entry that is no patch lies after the change; None when it is a patch or of another axis."""
        source, dim, index = node.args[:3]
        axis = views.labels.of(source)[dim]  # type: ignore[arg-type,index]
        sides = self._sides(views)
        if not _touches(axis, sides):
            return None
        place = index % source.meta["val"].shape[dim]  # type: ignore[operator,union-attr]
        if coordinates(axis, sides[0])[place] >= 0:
            return None
        return int(np.flatnonzero(indices(axis, self._keep(views)) == place)[0])

    def _matrix(self, views: Views, positions: Positions) -> torch.Tensor:
        """What takes old positions to new ones, `[new count, old count]`: the grid resampled, all others as they are."""
        down, across = (coordinates(positions.labels, side) for side in self._sides(views))
        old, new = self.grids
        place = np.flatnonzero((down >= 0) & (across >= 0))
        order = down[place] * old[1] + across[place]
        if (np.diff(place) != 1).any() or not np.array_equal(order, np.arange(old[0] * old[1])):
            raise Unfit(f"the positions in {positions.table!r} are not those of one row of patches after the other")
        eyes = [torch.eye(int(n), dtype=torch.float64) for n in (place[0], len(down) - place[-1] - 1)]
        grid = torch.kron(*(resize_matrix(a, b, self.positions) for a, b in zip(old, new, strict=True)))
        return torch.block_diag(eyes[0], grid, eyes[1])

    def _spell(self, rewriter: Rewriter, views: Views, stride: int) -> None:
        """Write the new sizes wherever the graph spells them out."""
        node = rewriter.node(self.node)
        node.args = (*_arguments(node)[:3], [stride, stride], *_arguments(node)[4:])
        for select in views.program.graph.graph.nodes:
            if select.target is aten.select.int and (place := self._selected(views, select)) is not None:
                today = rewriter.node(select)
                today.args = (*today.args[:2], place)
        spell_sizes(rewriter, views.labels, self._keep(views))


def resize_matrix(old: int, new: int, mode: str) -> torch.Tensor:
    """What resizes one side of a picture from `old` to `new` entries, float64 `[new, old]`, as torch interpolates."""
    columns = torch.eye(old, dtype=torch.float64).view(1, old, old, 1)
    resized = F.interpolate(columns, size=(new, 1), mode=mode, align_corners=False)
    return resized.view(old, new).T.contiguous()


def _mapped(expr: Expr, axis: int, matrix: torch.Tensor) -> Expr:
    """An expression with one axis taken through a matrix `[new, old]`."""
    return BlockMap(expr, axis, ((0,),), matrix[None, None])


def _touches(axis: Axis, sides: tuple[Atom, Atom]) -> bool:
    return any(leaf in sides for leaf in leaves(axis))


def _added(program: Program, node: fx.Node, axis: int, labels: Axis) -> list[Positions]:
    """A table, or numbers that look rows up in one, whose entries are added to the patches."""
    floating = node.meta["val"].dtype.is_floating_point
    if "weight" in node.meta and floating:
        _only_added(node)
        if axis < node.meta["val"].dim() - 2:
            raise Unfit(
                f"{node.meta['weight']!r} counts patches by an axis that is neither its last nor the one before"
            )
        return [Positions(node, node.meta["weight"], axis, labels)]
    if node.target in (aten.zeros.default, aten.ones.default, aten.full.default):
        return []
    if floating or not ("weight" in node.meta or node.target in _RANGES):
        raise Unfit(f"%{node.name} has one entry a patch and is no position")
    values = program.weights.evaluate(node.meta["weight"]) if "weight" in node.meta else node.target(*node.args)  # type: ignore[operator]
    if values.numel() != values.shape[axis]:
        raise Unfit(f"%{node.name} has several numbers a patch")
    found = []
    for user in node.users:
        table = user.args[0]
        looks_up = user.target is aten.embedding.default and user.args[1] is node and "weight" in table.meta  # type: ignore[union-attr]
        if not looks_up or len(table.users) != 1:  # type: ignore[union-attr]
            raise Unfit(f"%{node.name} numbers the patches for more than positions")
        _only_added(user)
        rows = tuple(int(value) for value in values.flatten())
        found.append(Positions(node, table.meta["weight"], 0, labels, rows))  # type: ignore[union-attr]
    return found


def _check_operands(labels: Labels, node: fx.Node, sides: tuple[Atom, Atom]) -> None:
    """Raise Unfit when an operand is as long as the patches are many and does not follow them: angles, biases."""
    moved = 3 if node.target is torch.ops.graphopt.attention.default else 1
    first: fx.Node = node.args[0]  # type: ignore[assignment]
    counts = [size for size, axis in zip(_sizes(first), labels.of(first), strict=True) if _touches(axis, sides)]
    for operand in (a for a in node.args[moved:] if isinstance(a, fx.Node)):
        for size, axis in zip(_sizes(operand), labels.of(operand), strict=True):
            if isinstance(size, int) and size in counts and not _touches(axis, sides):
                raise Unfit(f"%{operand.name} at %{node.name} is made for {size} tokens and cannot be resampled")


def _sizes(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _only_added(node: fx.Node) -> None:
    wrong = [user for user in node.users if user.target is not aten.add.Tensor]
    if wrong:
        raise Unfit(f"%{node.name} has one entry a patch and is not only added to them (%{wrong[0].name})")


def _renumber(rewriter: Rewriter, node: fx.Node, count: int) -> None:
    """Let numbers of positions count the new ones."""
    if "weight" in node.meta:
        shape = [count if size > 1 else 1 for size in node.meta["val"].shape]
        numbers = torch.arange(count).reshape(shape).to(node.meta["val"].dtype)
        rewriter.set_weight(node.meta["weight"], lambda _: Const(numbers, numbers.dtype))
    else:
        node.target, node.args = aten.arange.default, (count,)


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments of a convolution, defaults included; spread over two axes."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)} | dict(node.kwargs)
    return [given.get(argument.name, argument.default_value) for argument in schema]


def _named(program: Program, name: str) -> fx.Node:
    found: fx.Node = program.nodes[name]
    return found


# What these say of many entries is of the size of what they say of few; a sum grows with them.
_OF_ANY_NUMBER = (aten.mean.dim, aten.amax.default, aten.amin.default)
# Ops that go by the places of tokens.
_BY_PLACE = (torch.ops.graphopt.rotary.default, torch.ops.graphopt.attention.default)
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
