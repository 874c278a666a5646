"""Where heads sit in projection weights, found by sending row numbers through the graph's own layout operations.

No packing is assumed: rows of a weight are numbered, the nodes between the projection and the attention are run on the
numbers, and what arrives at the attention says which row is which feature of which head.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.views import Attention, Linear, Views
from graphopt.views.trace import MOVES

aten = torch.ops.aten

_LAYOUT = {*MOVES, aten.alias}
_NORMS = {torch.ops.graphopt.rms_norm, aten.layer_norm}


class Unfit(Exception):
    """An attention whose heads cannot be regrouped, and why."""


@dataclass(frozen=True, eq=False)
class Side:
    """One projection of an attention.

    `rows` `[heads, D]` numbers the weight's rows (for the output its columns); `nodes` lie between the projection and
    the attention, `numbers` holds what each carries; `pairs` `[F, 2]` are the features that rotary embedding turns;
    `gated` says that a tensor of the same shape multiplies in between, so that features cannot be mixed or moved.
    """

    linear: Linear
    rows: Tensor
    nodes: tuple[fx.Node, ...]
    numbers: dict[fx.Node, Any]
    pairs: Tensor
    normed: bool
    gated: bool = False


@dataclass(frozen=True, eq=False)
class Heads:
    """The four sides of one attention."""

    attention: Attention
    q: Side
    k: Side
    v: Side
    o: Side

    @property
    def pairs(self) -> Tensor:
        """Feature pairs `[F, 2]` that turn together; features outside do not turn."""
        return self.k.pairs


def find_heads(views: Views, attention: Attention) -> Heads:
    """Locate every head of an attention in its weights; raises Unfit with the reason when that is impossible."""
    if attention.core.target is not torch.ops.graphopt.attention.default:
        packet = str(getattr(attention.core.target, "overloadpacket", attention.core.target)).replace(".", "::")
        raise Unfit(f"{packet} says what its KV heads keep, one by one; regroup heads before their caches are bounded")
    linears = {}
    for name in "qkvo":
        linear = getattr(attention, name)
        if linear is None:
            raise Unfit(f"its {_NAMES[name]} are not made by one plain projection")
        linears[name] = linear
    for linear in dict.fromkeys(linears.values()):
        _check_private(views, linear)
    core = attention.core
    q, k, v = (_input_side(core, position, linears[name]) for position, name in enumerate("qkv"))
    if not torch.equal(q.pairs, k.pairs):
        raise Unfit("its queries and keys turn different features")
    if v.normed or len(v.pairs):
        raise Unfit("its values are normalised or turned, so they are no linear function of a weight")
    o = _output_side(core, linears["o"])
    inside = {core, *q.nodes, *k.nodes, *v.nodes}
    for side in (q, k, v):
        for node in side.nodes:
            _check_users(node, inside, "keys and values" if side is not q else "queries")
    return Heads(attention, q, k, v, o)


_NAMES = {"q": "queries", "k": "keys", "v": "values", "o": "results"}


def _check_private(views: Views, linear: Linear) -> None:
    for weight in (linear.weight, linear.bias):
        if weight is not None and len(views.program.weight_nodes[weight].users) > 1:
            raise Unfit(f"{weight} is shared with other places of the model")


def _check_users(node: fx.Node, inside: set[fx.Node], what: str) -> None:
    for user in node.users:
        if user not in inside and isinstance(user.meta.get("val"), Tensor | tuple | list):
            raise Unfit(f"its {what} are also read by %{user.name}")


def _input_side(core: fx.Node, position: int, linear: Linear) -> Side:
    end = core.args[position]
    assert isinstance(end, fx.Node)
    out = _width(linear.node)
    numbers: dict[fx.Node, Any] = {linear.node: torch.arange(out).expand(_fixed(linear.node))}
    nodes = _region(linear.node, end)
    turned, normed, gated = _send(nodes[1:], numbers)
    if gated and position:
        raise Unfit(f"its {'keys' if position == 1 else 'values'} are multiplied by another tensor, feature by feature")
    arrived = numbers[end]
    rows = arrived[0, :, 0, :]
    return Side(linear, rows, nodes, numbers, _pairs(turned, rows), normed, gated)


def _output_side(core: fx.Node, linear: Linear) -> Side:
    value = core.meta["val"]
    heads, width = int(value.shape[1]), int(value.shape[3])
    numbers: dict[fx.Node, Any] = {core: torch.arange(heads * width).reshape(1, heads, 1, width).expand(_fixed(core))}
    nodes = _region(core, linear.x)
    _, _, gated = _send(nodes[1:], numbers)
    inside = {*nodes, linear.node}
    for node in nodes:
        _check_users(node, inside, "results")
    arrived = numbers[linear.x].reshape(-1, heads * width)[0]
    if not torch.equal(arrived.sort().values, torch.arange(heads * width)):
        raise Unfit("the output projection does not read every feature of every head once")
    rows = torch.argsort(arrived).reshape(heads, width)
    return Side(linear, rows, nodes, numbers, torch.empty(0, 2).long(), False, gated)


def _fixed(node: fx.Node) -> list[int]:
    """The shape of a node's value where batch and length are 1, unless the graph fixes them."""
    return [size if isinstance(size, int) else 1 for size in node.meta["val"].shape]


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _region(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes on paths from `start` to `end`, both included, in graph order."""
    back, stack = {end}, [end]
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes if node is not start else ():
            if source not in back:
                back.add(source)
                stack.append(source)
    ahead, stack = {start}, [start]
    while stack:
        for user in stack.pop().users:
            if user in back and user not in ahead:
                ahead.add(user)
                stack.append(user)
    return tuple(sorted(ahead))


def _send(nodes: tuple[fx.Node, ...], numbers: dict[fx.Node, Any]) -> tuple[list[tuple[Tensor, bool]], bool, bool]:
    """Run layout operations on row numbers; returns what rotary embedding turns, and whether norms and gates were met."""
    turned: list[tuple[Tensor, bool]] = []
    normed = gated = False
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", node.target)
        source = numbers.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if packet is torch.ops.graphopt.rotary:
            assert isinstance(source, Tensor)
            width = _width(node.args[1])  # type: ignore[arg-type]
            turned.append((source[..., :width], bool(node.args[3])))
            numbers[node] = source
        elif packet in _NORMS and isinstance(source, Tensor):
            if source.dim() != 4:
                raise Unfit(f"%{node.name} normalises all heads together")
            normed = True
            numbers[node] = source
        elif source is not None and (packet is aten.to or _scales(node)):
            numbers[node] = source
        elif packet is aten.mul and (factor := _factor(node, numbers)) is not None:
            numbers[node], uniform = factor
            gated = gated or not uniform
        elif not isinstance(node.meta.get("val"), Tensor | tuple | list):
            continue
        elif packet in _LAYOUT or node.target is operator.getitem:
            arguments = fx.node.map_arg(node.args, lambda n: numbers[n] if n in numbers else _one(n))
            keywords = fx.node.map_arg(node.kwargs, lambda n: numbers[n] if n in numbers else _one(n))
            numbers[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
        else:
            name = str(packet).replace("graphopt.", "")
            raise Unfit(f"{name} at %{node.name} lies between a projection and the attention")
    return turned, normed, gated


def _factor(node: fx.Node, numbers: dict[fx.Node, Any]) -> tuple[Tensor, bool] | None:
    """What a product of a side and another tensor carries, and whether that tensor is one number a token."""
    sides = [a for a in node.args if isinstance(a, fx.Node)]
    known = [a for a in sides if isinstance(numbers.get(a), Tensor)]
    if len(sides) != 2 or len(known) != 1:
        return None
    value = next(a for a in sides if a is not known[0]).meta["val"]
    carried: Tensor = numbers[known[0]]
    if value.dim() > carried.dim():
        return None
    # Of the axes on which the numbers differ (heads, features) a number a token has one entry.
    sizes = [1] * (carried.dim() - value.dim()) + list(value.shape)
    wide = [
        mine > 1 and not (isinstance(size, int) and size == 1) for mine, size in zip(carried.shape, sizes, strict=True)
    ]
    return carried, not any(wide)


def _scales(node: fx.Node) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return packet in (aten.mul, aten.div) and isinstance(node.args[1], int | float)


def _one(node: fx.Node) -> int:
    """A symbolic size when batch and length are 1; one that counts heads as well would not follow a change of heads."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        if int(expr.subs({symbol: 1 for symbol in expr.free_symbols})) != 1:
            raise Unfit(f"%{node.name} counts batch and heads together; cleanup may take it out")
        return 1
    if isinstance(value, int):
        return value
    raise Unfit(f"%{node.name} joins a projection before the attention")


def _pairs(turned: list[tuple[Tensor, bool]], rows: Tensor) -> Tensor:
    """Positions in a head of the features that turn together; the same in every head, or Unfit."""
    found: list[Tensor] = []
    place = torch.empty(int(rows.max()) + 1, dtype=torch.long)
    place[rows.reshape(-1)] = torch.arange(rows.shape[1]).expand_as(rows).reshape(-1)
    for numbers, interleaved in turned:
        if numbers.dim() != 4 or numbers.shape[1] != rows.shape[0]:
            raise Unfit("rotary embedding is applied before the heads are apart")
        spots = place[numbers[0, :, 0, :]]
        if not bool((spots == spots[:1]).all()):
            raise Unfit("heads turn different features")
        spot, half = spots[0], spots.shape[1] // 2
        first, second = (spot[0::2], spot[1::2]) if interleaved else (spot[:half], spot[half:])
        found.append(torch.stack([first, second], dim=1))
    return torch.cat(found) if found else torch.empty(0, 2, dtype=torch.long)
