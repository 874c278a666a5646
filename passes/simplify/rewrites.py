"""Finding and carrying out exact simplifications."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.program import Program, specialise
from graphopt.ir.purity import is_pure
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Const
from graphopt.passkit.edits import Edit
from graphopt.views import Views

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Merge(Edit):
    """Let readers of each first node read the second instead; `kind` is `identity` or `common`."""

    kind: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def candidate(self) -> str:
        """The kind of simplification."""
        return self.kind

    def describe(self) -> str:
        """How many operations go."""
        what = "operations that change nothing" if self.kind == "identity" else "repeated operations"
        return f"{len(self.pairs)} {what}: {_some([old for old, _ in self.pairs])}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": self.kind, "replace": [list(pair) for pair in self.pairs]}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Redirect the readers; what is no longer read goes when the rewrite closes."""
        for old, new in self.pairs:
            rewriter.replace(rewriter.node(old), rewriter.node(new))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: the original is the reference."""


@dataclass(frozen=True, eq=False)
class Fold(Edit):
    """Compute nodes now and keep the results as constants."""

    values: tuple[tuple[str, Const], ...]

    @property
    def candidate(self) -> str:
        """The kind of simplification."""
        return "constant"

    def describe(self) -> str:
        """How many constants are made."""
        return f"{len(self.values)} constants folded: {_some([name for name, _ in self.values])}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "constant", "nodes": {name: list(value.shape) for name, value in self.values}}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Add each constant and let readers of its node read it."""
        for name, value in self.values:
            made = rewriter.add_weight(f"folded.{name}", value, "constant")
            rewriter.replace(rewriter.node(name), made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: the original is the reference."""


@dataclass(frozen=True, eq=False)
class Dead(Edit):
    """Remove nodes, and weights, that nobody reads."""

    nodes: tuple[str, ...]

    @property
    def candidate(self) -> str:
        """The kind of simplification."""
        return "dead"

    def describe(self) -> str:
        """How many go."""
        return f"{len(self.nodes)} dead nodes: {_some(list(self.nodes))}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "dead", "nodes": list(self.nodes)}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing of its own: closing a rewrite removes what is dead."""

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: the original is the reference."""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass
class Found:
    """Edits by kind, and near misses as (kind, node, reason)."""

    edits: dict[str, Edit] = field(default_factory=dict)
    near: list[tuple[str, str, str]] = field(default_factory=list)


def find_rewrites(program: Program, kinds: frozenset[str], largest: int) -> Found:
    """All simplifications of the chosen kinds, found in one walk: each sees what those before it left."""
    found = Found()
    live = _live(program)
    dead = [node.name for node in program.graph.graph.nodes if node not in live and node.op != "output"]
    if "dead" in kinds and dead:
        found.edits["dead"] = Dead(tuple(dead))
    stands: dict[fx.Node, fx.Node] = {}
    seen: dict[Any, fx.Node] = {}
    same: list[tuple[str, str]] = []
    repeated: list[tuple[str, str]] = []
    for node in program.graph.graph.nodes:
        stands[node] = node
        if node.op != "call_function" or node not in live or not _deterministic(node):
            continue
        source = _unchanged(node, stands, found) if "identity" in kinds else None
        if source is not None:
            stands[node] = source
            same.append((node.name, source.name))
            continue
        if "common" in kinds:
            first = seen.setdefault(_key(node, stands), node)
            if first is not node:
                stands[node] = first
                repeated.append((node.name, first.name))
    if same:
        found.edits["identity"] = Merge("identity", tuple(same))
    if repeated:
        found.edits["common"] = Merge("common", tuple(repeated))
    if "constant" in kinds:
        values = _constants(program, stands, live, largest, found)
        if values:
            found.edits["constant"] = Fold(tuple(values))
    return found


def _live(program: Program) -> set[fx.Node]:
    """Nodes that a result, an input or an effect needs."""
    stack = [node for node in program.graph.graph.nodes if node.op != "placeholder" and not is_pure(node)]
    stack += [node for node in program.graph.graph.nodes if "input" in node.meta]
    live = set(stack)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in live:
                live.add(source)
                stack.append(source)
    return live


def _deterministic(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return is_pure(node) and torch.Tag.nondeterministic_seeded not in tags


def _key(node: fx.Node, stands: dict[fx.Node, fx.Node]) -> Any:
    """What a node computes: its operation and arguments, with numbers told apart by type and sign."""

    def freeze(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", stands[value].name)
        if isinstance(value, list | tuple):
            return (type(value).__name__ == "slice", *(freeze(item) for item in value))
        if isinstance(value, dict):
            return tuple((key, freeze(item)) for key, item in sorted(value.items()))
        return (type(value).__name__, repr(value))

    return (node.target, freeze(node.args), freeze(dict(node.kwargs)))


def _unchanged(node: fx.Node, stands: dict[fx.Node, fx.Node], found: Found) -> fx.Node | None:
    """The node whose value this one returns as it is, None when it changes something."""
    packet = getattr(node.target, "overloadpacket", None)
    check = _IDENTITIES.get(packet)
    if check is None or not node.args:
        return None
    first = node.args[0][0] if packet is aten.cat else node.args[0]  # type: ignore[index]
    if not isinstance(first, fx.Node):
        return None
    source = stands[first]
    original = check(node, source, stands)
    if original is None or not _alike(node, original):
        return None
    if packet is aten.add and node.meta["val"].dtype.is_floating_point and math.copysign(1, _number(node)) > 0:
        found.near.append(("identity", node.name, "x + 0 turns -0.0 into 0.0"))
        return None
    return original


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape, type and device for every input."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype or x.device != y.device:
        return False
    return x.dim() == y.dim() and all(_size(m) == _size(n) for m, n in zip(x.shape, y.shape, strict=True))


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


Check = Callable[[fx.Node, fx.Node, dict[fx.Node, fx.Node]], fx.Node | None]


def _reshaped(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """What has the same shape already: the source, or what the source itself only reshaped."""
    before = source
    while not _alike(node, before) and getattr(before.target, "overloadpacket", None) in _RESHAPES:
        before = stands[before.args[0]]  # type: ignore[index]
    return before


def _given(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    return source


_RESHAPES = (aten.view, aten.reshape, aten._unsafe_view)


def _number(node: fx.Node) -> float:
    other = node.args[1]
    return float(other) if isinstance(other, int | float) else math.nan


def _neutral(value: float) -> Check:
    def check(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
        # Scaled additions (alpha) and rounded divisions carry more arguments and are left alone.
        return source if len(node.args) == 2 and not node.kwargs and _number(node) == value else None

    return check


def _cast(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A repeated cast, or one of integers: float types follow the run, but tables of constants keep theirs."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return None
    cast = source.target is aten.to.dtype and source.args[1] == node.args[1]
    return source if cast or not node.meta["val"].dtype.is_floating_point else None


def _off(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    return source if node.args[2] is False else None


def _single(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    return source if len(node.args[0]) == 1 else None  # type: ignore[arg-type]


def _back(node: fx.Node, source: fx.Node, stands: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """A transpose or permutation that undoes the one before it."""
    before = _order(source)
    after = _order(node)
    if before is None or after is None or [before[i] for i in after] != list(range(len(after))):
        return None
    return stands[source.args[0]]  # type: ignore[index]


def _order(node: fx.Node) -> list[int] | None:
    """The permutation of axes that a node makes."""
    if node.target is aten.permute.default:
        rank = node.meta["val"].dim()
        return [axis % rank for axis in node.args[1]]  # type: ignore[union-attr,operator]
    if node.target is aten.transpose.int:
        rank = node.meta["val"].dim()
        order = list(range(rank))
        i, j = node.args[1] % rank, node.args[2] % rank  # type: ignore[operator]
        order[i], order[j] = order[j], order[i]
        return order
    return None


_IDENTITIES: dict[Any, Check] = {
    aten.view: _reshaped,
    aten.reshape: _reshaped,
    aten._unsafe_view: _reshaped,
    aten.expand: _given,
    aten.alias: _given,
    aten.slice: lambda node, source, stands: source if len(node.args) < 5 or node.args[4] == 1 else None,
    aten.to: _cast,
    aten.mul: _neutral(1.0),
    aten.div: _neutral(1.0),
    aten.sub: _neutral(0.0),
    aten.add: _neutral(0.0),
    aten.dropout: _off,
    aten.cat: _single,
    aten.transpose: _back,
    aten.permute: _back,
}


def _constants(
    program: Program, stands: dict[fx.Node, fx.Node], live: set[fx.Node], largest: int, found: Found
) -> list[tuple[str, Const]]:
    """Nodes that depend on constants alone and are read by something that does not."""
    fixed: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        if "weight" in node.meta:
            if program.weights[node.meta["weight"]].kind == "constant":
                fixed.add(node)
        elif node.op == "call_function" and _deterministic(node) and isinstance(node.target, torch._ops.OpOverload):
            value = node.meta.get("val")
            known = isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
            if known and all(stands[source] in fixed for source in node.all_input_nodes):
                fixed.add(node)
    values = []
    for node in program.graph.graph.nodes:
        if node not in fixed or node.op == "placeholder" or node not in live or stands[node] is not node:
            continue
        users = [user for user in node.users if user in live]
        users += [user for other, mine in stands.items() if mine is node and other is not node for user in other.users]
        if all(user in fixed and stands[user] is user for user in users):
            continue
        value = _fold(program, node, largest)
        if isinstance(value, str):
            found.near.append(("constant", node.name, value))
        else:
            values.append((node.name, value))
    return values


def _fold(program: Program, node: fx.Node, largest: int) -> Const | str:
    """The constant value of a node, or why it is not folded."""
    kind = node.meta["val"].dtype
    count = node.meta["val"].numel()
    if count > largest:
        return f"its {count} elements are more than {largest}"
    if kind.is_floating_point and kind not in (torch.float32, torch.float64):
        return f"its type {kind} follows the type of the run"
    try:
        narrow, wide = _run(program, node, torch.float32), _run(program, node, torch.float64)
    except LookupError:
        return "its value cannot be read: the program was captured without weights"
    if kind.is_floating_point and wide.dtype != torch.float64:
        # Constants widen with the run; a type that comes from promotion (integers divided) does not.
        return f"its type {kind} does not follow the type of the run"
    if not torch.equal(wide.to(kind), narrow.to(kind)) or not torch.equal(
        torch.signbit(wide.to(kind)), torch.signbit(narrow.to(kind))
    ):
        return "it rounds differently in different precisions"
    return Const(wide, kind)


def _run(program: Program, node: fx.Node, dtype: torch.dtype) -> Tensor:
    """Compute one node from constants as a run in `dtype` would."""
    values: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in values:
            if "weight" in n.meta:
                values[n] = program.weights.evaluate(n.meta["weight"], dtype)
            else:
                arguments = fx.node.map_arg(n.args, value)
                keywords = fx.node.map_arg(n.kwargs, value)
                change = {"model": program.dtype, "target": dtype, "device": "cpu"}
                arguments = fx.node.map_aggregate(arguments, lambda a: specialise(a, **change))  # type: ignore[arg-type]
                keywords = fx.node.map_aggregate(keywords, lambda a: specialise(a, **change))  # type: ignore[arg-type]
                values[n] = n.target(*arguments, **keywords)  # type: ignore[operator]
        return values[n]

    result: Tensor = value(node)
    return result.contiguous()
