"""Walks over the graph that views are found with: through layouts to projections, through activations to products."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from graphopt.views.atoms import Atom, Axis, flat, leaves
from graphopt.views.labels import Labels
from graphopt.views.routing import Linear

aten = torch.ops.aten


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold tensors of one shape."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
        return False
    # A size that depends on values equals none that is known.
    return all(guard_or_false(a == b) for a, b in zip(x.shape, y.shape, strict=True))


def reachable(start: list[fx.Node], step: object) -> set[fx.Node]:
    """Everything that repeated steps lead to from some nodes."""
    seen, stack = set(start), list(start)
    while stack:
        for other in step(stack.pop()):  # type: ignore[operator]
            if other not in seen:
                seen.add(other)
                stack.append(other)
    return seen


def between(entry: fx.Node, exit: fx.Node) -> set[fx.Node]:
    """Nodes on paths from entry (excluded) to exit (included)."""
    back, stack = {exit}, [exit]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source is not entry and source not in back:
                back.add(source)
                stack.append(source)
    ahead, stack = set(), [entry]
    while stack:
        for user in stack.pop().users:
            if user in back and user not in ahead:
                ahead.add(user)
                stack.append(user)
    return ahead


# Operations that put entries elsewhere and change none.
MOVES = {
    aten.view,
    aten.reshape,
    aten.transpose,
    aten.permute,
    aten.contiguous,
    aten.clone,
    aten.unsqueeze,
    aten.squeeze,
    aten.flatten,
    aten.unflatten,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unbind,
    aten.slice,
    aten.select,
    aten._unsafe_view,
    aten.cat,
}
TRANSPARENT = {
    *MOVES,
    aten.to,
    torch.ops.graphopt.rotary,
    torch.ops.graphopt.rms_norm,
    aten.layer_norm,
    aten.batch_norm,
    aten.add,
    aten.mul,
    aten.div,
    aten.neg,
    aten.expand,
    aten.stack,
}


def source_linear(labels: Labels, node: fx.Node) -> Linear | None:
    """The one product that an attention input comes from, through layout changes, norms and rotary embedding."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if current in labels.linears:
            found.add(current)
            continue
        packet = getattr(current.target, "overloadpacket", None)
        if packet in TRANSPARENT or getattr(current.target, "__name__", "") == "getitem":
            if packet is torch.ops.graphopt.rotary:
                stack.append(current.args[0])  # type: ignore[arg-type]
            else:
                stack.extend(
                    n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)
                )
    return labels.linears[next(iter(found))] if len(found) == 1 else None


def unrepeated(labels: Labels, axis: Axis, k: Linear | None) -> Axis:
    """The head axis of the keys without the factors that only repeat KV heads: those run through no key weight."""
    if k is None:
        return axis
    own = set(leaves(labels.weight_axes[k.weight][k.out_axis]))
    factors = flat(axis)
    held = [f for f in factors if isinstance(f, Atom) and (f.parts is not None or f in own)]
    return tuple(held) if 0 < len(held) < len(factors) else axis


def consumer_linear(labels: Labels, node: fx.Node) -> Linear | None:
    """The one product that reads an attention's output through layout changes."""
    stack, found = [node], []
    seen: set[fx.Node] = set()
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user in labels.linears:
                found.append(labels.linears[user])
            elif getattr(user.target, "overloadpacket", None) in TRANSPARENT:
                stack.append(user)
    return found[0] if len(found) == 1 else None


def elementwise_sources(labels: Labels, node: fx.Node) -> tuple[list[fx.Node], list[Linear]]:
    """Pointwise nodes and the products behind an activation, going back from a down projection's input."""
    between: list[fx.Node] = []
    products: list[Linear] = []
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function" or isinstance(current.meta["val"], int | torch.SymInt):
            continue
        seen.add(current)
        product = labels.linears.get(current) or labels.bank_linears.get(current)
        if product is not None:
            products.append(product)
            continue
        if (_small(current) and not _small(node)) or _picked_bias(current):
            continue
        packet = getattr(current.target, "overloadpacket", None)
        if current in labels.filters:
            between.append(current)
            stack.append(current.args[0])  # type: ignore[arg-type]
            continue
        pointwise = torch.Tag.pointwise in getattr(current.target, "tags", ())
        moves = packet in LAYOUT or getattr(current.target, "__name__", "") == "getitem"
        if pointwise or activation(current) or spelled(current) or moves:
            between.append(current)
            stack.extend(current.all_input_nodes)
        else:
            return between, []
    return between, products


LAYOUT = {
    aten.view,
    aten.reshape,
    aten.view_as,
    aten.reshape_as,
    aten.flatten,
    aten.unflatten,
    aten._unsafe_view,
    aten.contiguous,
    aten.split,
    aten.split_with_sizes,
    aten.chunk,
    aten.unbind,
    aten.slice,
    aten.select,
    aten.squeeze,
    aten.unsqueeze,
    aten.transpose,
    aten.permute,
    aten.to,
    aten.clone,
    aten.batch_norm,
    aten.layer_norm,
    torch.ops.graphopt.rms_norm,
}


def _small(node: fx.Node) -> bool:
    """Whether a factor of a product has one entry a token or fewer: routing weights, gains, biases picked by index."""
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[-1] == 1


def _picked_bias(node: fx.Node) -> bool:
    """Whether a node is the rows of a table of biases that an index chooses: one a token's expert."""
    table = node.args[0] if getattr(node.target, "overloadpacket", None) is aten.index else None
    return isinstance(table, fx.Node) and "weight" in table.meta and table.meta["val"].dim() == 2


ACTIVATIONS = {
    aten.silu,
    aten.gelu,
    aten.relu,
    aten.tanh,
    aten.sigmoid,
    aten.relu6,
    aten.mish,
    aten.leaky_relu,
    aten.hardswish,
    aten.elu,
    aten.softplus,
    aten.erf,
}


# What activations that a model spells out are made of; a known function among them gives the name.
SPELLED = {aten.expm1, aten.exp, aten.pow, aten.square, aten.clamp, aten.where, aten.maximum}


def activation(node: fx.Node) -> bool:
    """Whether a node is a known activation function."""
    return getattr(node.target, "overloadpacket", None) in ACTIVATIONS


def spelled(node: fx.Node) -> bool:
    """Whether a node is a nonlinear piece of an activation function."""
    return getattr(node.target, "overloadpacket", None) in SPELLED


def gate_of(products: list[Linear], activation: fx.Node) -> Linear:
    """Of two products the one that goes through the activation."""
    behind = reachable([activation], lambda n: n.all_input_nodes if n.op == "call_function" else ())
    return next((p for p in products if p.node in behind), products[0])


def chosen(down: Linear) -> fx.Node | None:
    """The choices `[..., k]` of experts behind the index that a product with a bank reads, before they become a list."""
    node = down.index
    while node is not None and getattr(node.target, "overloadpacket", None) in (*LAYOUT, aten.expand):
        node = node.args[0] if isinstance(node.args[0], fx.Node) else None
    return node


def share(down: Linear, index: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What each chosen expert counts, of the shape of `index`: the factor of a bank's output; and that product."""
    node = down.node
    while len(users := [u for u in node.users if getattr(u.target, "overloadpacket", None) is not aten.sym_size]) == 1:
        (user,) = users
        packet = getattr(user.target, "overloadpacket", None)
        if packet is aten.mul:
            factors = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            found = _unfolded(factors[0], index) if len(factors) == 1 else None
            return found, user if found is not None else None
        if packet not in LAYOUT and packet is not aten.add:
            break
        node = user
    return None, None


def _unfolded(node: fx.Node, like: fx.Node) -> fx.Node | None:
    """The node of the shape of `like` behind casts and reshapes."""
    while not same_shape(node, like):
        if getattr(node.target, "overloadpacket", None) not in LAYOUT or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return node


def positions(q: fx.Node) -> str:
    """How positions enter the queries: `rotary` or `none`."""
    stack, seen = [q], set()
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        packet = getattr(node.target, "overloadpacket", None)
        if packet is torch.ops.graphopt.rotary:
            return "rotary"
        if packet in (aten.linear, aten.addmm, aten.matmul, aten.mm):
            continue
        if packet in (aten.cos, aten.sin, torch.ops.aten.complex, aten.view_as_complex):
            return "rotary"
        stack.extend(node.all_input_nodes)
    return "none"


def stream_source(node: fx.Node) -> fx.Node | None:
    """The tensor that a projection reads, to tell self from cross attention."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        packet = getattr(current.target, "overloadpacket", None)
        if packet in (aten.linear, aten.addmm):
            return current.args[1 if packet is aten.addmm else 0]  # type: ignore[return-value]
        stack.extend(n for n in current.all_input_nodes[:1])
    return None


def derives_from(node: object, names: set[str]) -> bool:
    """Whether a node depends on the values, and not the sizes alone, of one of some inputs."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        if current.meta.get("input") in names:
            return True
        if getattr(current.target, "overloadpacket", None) is aten.sym_size:
            continue
        stack.extend(current.all_input_nodes)
    return False


def mixes_streams(node: object) -> bool:
    """Whether a product mixes the n streams `[B, S, n, D]` that a model carries side by side."""
    if not isinstance(node, fx.Node) or getattr(node.target, "overloadpacket", None) is not aten.matmul:
        return False
    weights, streams = (factor.meta["val"].shape for factor in node.args[:2])  # type: ignore[union-attr]
    return (
        len(weights) == len(streams) == 4
        and all(isinstance(n, int) for n in weights[-2:])
        and weights[-2] == weights[-1] == streams[-2]
        and (not isinstance(streams[1], int) or streams[-2] < streams[1])
    )


def path(node: fx.Node) -> str:
    """The module path that a node is shown under."""
    return str(node.meta.get("path", node.name))


def common_path(*paths: str) -> str:
    """The longest path that all paths begin with."""
    parts = [path.split(".") for path in paths]
    common = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return ".".join(common) or paths[0]
