"""Costs of a program and of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.cost.flops import node_flops, sizes_of
from graphopt.cost.formula import formula
from graphopt.ir.follow import Lost
from graphopt.ir.leaving import leaving, losing, rooms
from graphopt.ir.program import Program
from graphopt.ops.quantised import groups, row_bytes
from graphopt.views import Views

ZERO = sympy.Integer(0)
CORES = (
    torch.ops.graphopt.admitted_attention.default,
    torch.ops.graphopt.admitting_attention.default,
    torch.ops.graphopt.attention.default,
    torch.ops.graphopt.bounded_attention.default,
    torch.ops.graphopt.cached_attention.default,
    torch.ops.graphopt.held_attention.default,
    torch.ops.graphopt.packed_attention.default,
    torch.ops.graphopt.quantised_attention.default,
)


@dataclass(frozen=True)
class Part:
    """What one part of a program costs; a weight that several parts read belongs to the first.

    `flops` and `kv_bytes` are formulae in the program's dimensions; `bytes` counts saved weights as they are stored.
    """

    path: str
    kind: str
    parameters: int
    bytes: int
    flops: sympy.Expr
    kv_bytes: sympy.Expr

    def to_json(self) -> dict[str, Any]:
        """Plain data, formulae as text that sympy reads."""
        return {
            "path": self.path,
            "kind": self.kind,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "flops": str(self.flops),
            "kv_bytes": str(self.kv_bytes),
        }


@dataclass(frozen=True)
class Breakdown:
    """Costs by part: each block with its views, and what lies outside of all blocks. Their sum is the whole."""

    blocks: tuple[Part, ...]
    views: tuple[tuple[Part, ...], ...]
    outside: tuple[Part, ...]


@dataclass(frozen=True)
class Cost:
    """What a program costs: `parameters` (each tie once), `bytes`, and `flops` and `kv_bytes` in its dimensions.

    FLOPs are those of one run of the stateless graph. KV bytes are keys and values of every causal self-attention, a
    windowed one holding at most its window; `kv_bytes_per_token` is what one more token of one sequence adds before any
    window is full. `uncounted` lists ops without a formula, which count zero, and `notes` what else was left out.
    """

    parameters: int
    bytes: int
    flops: sympy.Expr
    kv_bytes: sympy.Expr
    kv_bytes_per_token: int
    uncounted: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    program: Program | None = field(default=None, repr=False, compare=False)

    def at(self, **sizes: int) -> dict[str, int]:
        """The numbers at given dimension sizes, such as `at(B=1, S=2048)`; raises KeyError when a size is missing."""
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "flops": _number(self.flops, sizes),
            "kv_bytes": _number(self.kv_bytes, sizes),
            "kv_bytes_per_token": self.kv_bytes_per_token,
        }

    @cached_property
    def breakdown(self) -> Breakdown:
        """Costs by block and view; raises ValueError for a Cost that was not made by `cost(program)`."""
        if self.program is None:
            raise ValueError("this cost was not counted from a program")
        return _breakdown(self.program, Views(self.program))

    def to_json(self) -> dict[str, Any]:
        """Plain data, formulae as text that sympy reads."""
        parts = self.breakdown
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "flops": str(self.flops),
            "kv_bytes": str(self.kv_bytes),
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "blocks": [
                {**block.to_json(), "views": [view.to_json() for view in views]}
                for block, views in zip(parts.blocks, parts.views, strict=True)
            ],
            "outside": [part.to_json() for part in parts.outside],
            "uncounted": dict(self.uncounted),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.bytes:,} bytes, FLOPs {formula(self.flops)}, "
            f"KV bytes {formula(self.kv_bytes)}"
        )


def cost(program: Program) -> Cost:
    """Count a program: FLOPs as torch.utils.flop_counter counts them, causal attention in full."""
    rename = dimension_names(program)
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    uncounted: Counter[str] = Counter()
    terms = []
    for node in nodes:
        flops = node_flops(node)
        if flops is None:
            uncounted[str(node.target)] += 1
        else:
            terms.append(flops)
    cores = [node for node in nodes if node.target in CORES]
    fewer = _without_past(program)
    caches = [_cache(node, fewer.get(node)) for node in cores]
    notes = tuple(
        f"the KV cache of %{node.name} is not counted: its mask is computed by the graph"
        for node, cache in zip(cores, caches, strict=True)
        if cache is None
    )
    held = [cache for cache in caches if cache is not None]
    return Cost(
        parameters=program.weights.parameters,
        bytes=program.weights.bytes,
        flops=_sum(terms, rename),
        kv_bytes=_sum((size for size, _ in held), rename),
        kv_bytes_per_token=sum(token for _, token in held),
        uncounted=dict(uncounted),
        notes=notes,
        program=program,
    )


def dimension_names(program: Program) -> dict[sympy.Symbol, sympy.Expr]:
    """From the symbols in a program's shapes to symbols called as its dimensions, B and S, or what these come to."""
    shorter = rooms(program)
    shapes = {spec.name: spec.shape for spec in program.entry.inputs}
    found: dict[sympy.Symbol, sympy.Expr] = {}
    for node in program.graph.graph.nodes:
        if "input" in node.meta:
            for size, name in zip(sizes_of(node.meta["val"]), shapes[node.meta["input"]], strict=True):
                if isinstance(name, str) and isinstance(size, sympy.Symbol):
                    found[size] = shorter.get(name, sympy.Symbol(name, positive=True, integer=True))
    return found


def _without_past(program: Program) -> dict[fx.Node, sympy.Expr]:
    """How many entries an attention's cache holds behind the prompt where it loses what leaves later."""
    nodes = [node for node in program.graph.graph.nodes if node.target in CORES]
    lose = losing(program)
    if lose:
        sizes = rooms(program)
        cached = [node for node in nodes if node.target is torch.ops.graphopt.cached_attention.default]
        return {node: sizes[lose[name][2]] for node in cached if (name := node.args[3].meta["input"]) in lose}
    try:
        found = leaving(program)
    except Lost:
        return {}
    if found is None or not found.past:
        return {}
    levels = {node: found.level(node.args[1].meta["val"].shape[2]) for node in nodes}
    return {node: found.sizes[found.past] for node, level in levels.items() if level is not None and level < found.past}


def _cache(core: fx.Node, fewer: sympy.Expr | None) -> tuple[sympy.Expr, int] | None:
    """KV bytes of an attention in its shapes' symbols and bytes a token; zero for one that needs no cache.

    `fewer` is how many entries it holds where that does not follow from its shapes.
    """
    cached = (
        torch.ops.graphopt.admitting_attention.default,
        torch.ops.graphopt.cached_attention.default,
        torch.ops.graphopt.held_attention.default,
    )
    if core.target in cached:
        keys, values = (core.args[i].meta["val"] for i in (3, 4))  # type: ignore[union-attr]
        batch, kv_heads, capacity, head = sizes_of(keys)
        token = kv_heads * (head * keys.dtype.itemsize + sizes_of(values)[3] * values.dtype.itemsize)
        return batch * (capacity if fewer is None else fewer) * token, int(token)
    if core.target is torch.ops.graphopt.packed_attention.default:
        keys, values = (core.args[i].meta["val"] for i in (3, 4))  # type: ignore[union-attr]
        bits, group, recent = core.args[17:20]
        blocks = sizes_of(core.args[8].meta["val"])[2]  # type: ignore[union-attr]
        return _packed(keys, values, blocks, bits, group, recent)  # type: ignore[arg-type]
    q, k, v = (core.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    mask, causal, window = core.args[3], core.args[6], core.args[7]
    if not causal:
        computed = isinstance(mask, fx.Node) and mask.meta["val"].dim() > 2
        return None if computed else (ZERO, 0)
    batch, kv_heads, length, head = sizes_of(k)
    token = kv_heads * (head * k.dtype.itemsize + sizes_of(v)[3] * v.dtype.itemsize)
    if sizes_of(q)[2] != length:
        return ZERO, 0
    if fewer is not None:
        return batch * fewer * token, int(token)
    if core.target is torch.ops.graphopt.bounded_attention.default:
        gates, heads, sink, recent, heavy, compensate = core.args[10:16]
        if gates is not None:
            # Gates decide nothing yet.
            heads = ()
        held = sympy.Min(length, sink + recent + heavy + compensate)  # type: ignore[operator]
        share = sympy.Rational(len(heads), kv_heads)  # type: ignore[arg-type]
        return batch * (share * held + (1 - share) * length) * token, int(token)
    if core.target is torch.ops.graphopt.quantised_attention.default:
        bits, group, recent = core.args[9:12]
        return _packed(k, v, sympy.floor(length / group), bits, group, recent)  # type: ignore[arg-type]
    return batch * (length if window is None else sympy.Min(length, window)) * token, int(token)


def _packed(
    k: torch.Tensor, v: torch.Tensor, blocks: Any, bits: int, group: int, recent: int
) -> tuple[sympy.Expr, int]:
    """Bytes of a ring in full precision and of `blocks` of `group` tokens with their scales, and of a token of these."""
    batch, kv_heads, _, size = sizes_of(k)
    width, wide = sizes_of(v)[3], k.dtype.itemsize
    keys = size * (row_bytes(group, bits) + 2 * wide)
    values = group * (row_bytes(width, bits) + 2 * wide * groups(width, min(group, width)))
    ring = (recent + group) * (size + width) * wide
    return batch * kv_heads * (blocks * (keys + values) + ring), int(kv_heads * (keys + values) // group)


def _breakdown(program: Program, views: Views) -> Breakdown:
    rename, fewer = dimension_names(program), _without_past(program)
    taken: set[str] = set()
    claimed: set[fx.Node] = set()

    def part(path: str, kind: str, nodes: Iterable[fx.Node]) -> Part:
        inside = list(nodes)
        claimed.update(inside)
        names = {w for node in inside for w in _weights(node) if w not in taken}
        taken.update(names)
        weights = [program.weights[name] for name in names]
        caches = [_cache(node, fewer.get(node)) or (ZERO, 0) for node in inside if node.target in CORES]
        return Part(
            path,
            kind,
            sum(torch.Size(w.expr.shape).numel() for w in weights if w.kind == "parameter"),
            sum(torch.Size(w.expr.shape).numel() * w.expr.dtype.itemsize for w in weights if w.kind != "constant"),
            _sum((node_flops(node) or ZERO for node in inside), rename),
            _sum((size for size, _ in caches), rename),
        )

    # Outside parts claim their weights first, in graph order, so that a tied head is free and the embedding is not.
    home = _homes(program, views)
    groups: dict[str, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and node not in home:
            groups.setdefault(str(node.meta.get("path", "")), []).append(node)
    outside = [part(path, _kind(nodes), nodes) for path, nodes in groups.items()]
    blocks, inner = [], []
    for block in views.blocks:
        parts = []
        inside = [node for node, index in home.items() if index == block.index]
        regions = [(a.path, "attention", _region(a.core, (a.q, a.k, a.v, a.o))) for a in block.attentions]
        regions += [(f.path, "feed_forward", _region(f.down.node, (f.up, f.gate))) for f in block.feed_forwards]
        for path, kind, wanted in regions:
            parts.append(part(path, kind, [n for n in inside if n in wanted and n not in claimed]))
        parts.append(part(block.path, "other", [n for n in inside if n not in claimed]))
        blocks.append(_total(block.path, "block", parts))
        inner.append(tuple(p for p in parts if p.kind != "other" or p.parameters or p.flops != 0))
    return Breakdown(tuple(blocks), tuple(inner), tuple(p for p in outside if p.parameters or p.bytes or p.flops != 0))


def _homes(program: Program, views: Views) -> dict[fx.Node, int]:
    """The block of each node, those included that prepare a weight (a gain of 1 + w) for one block alone."""
    home = {node: block.index for block in views.blocks for node in block.nodes}
    prepares: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and all("weight" in s.meta or s in prepares for s in sources):
            prepares.add(node)
    for node in reversed(program.graph.graph.nodes):
        blocks = {home.get(user) for user in node.users}
        if node in prepares and len(blocks) == 1 and None not in blocks:
            home[node] = next(iter(blocks))  # type: ignore[assignment]
    return home


def _region(core: fx.Node, linears: Iterable[Any]) -> set[fx.Node]:
    """A core, the products around it and all that lies between them."""
    ends = [linear.node for linear in linears if linear is not None]
    inside = {core, *ends}
    behind, stack = {core}, [core]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in behind and source.op == "call_function":
                behind.add(source)
                if source not in ends:
                    stack.append(source)
    ahead, stack = set(ends), list(ends)
    while stack:
        for user in stack.pop().users:
            if user in behind and user not in ahead:
                ahead.add(user)
                stack.append(user)
    return inside | (behind & ahead)


def _weights(node: fx.Node) -> Iterable[str]:
    return (source.meta["weight"] for source in node.all_input_nodes if "weight" in source.meta)


def _kind(nodes: list[fx.Node]) -> str:
    targets = {getattr(node.target, "overloadpacket", None) for node in nodes}
    if torch.ops.aten.embedding in targets:
        return "embedding"
    if targets & {torch.ops.aten.linear, torch.ops.aten.addmm, torch.ops.aten.matmul, torch.ops.aten.mm}:
        return "head"
    if targets & {torch.ops.aten.layer_norm, torch.ops.graphopt.rms_norm}:
        return "norm"
    return "other"


def _total(path: str, kind: str, parts: list[Part]) -> Part:
    return Part(
        path,
        kind,
        sum(p.parameters for p in parts),
        sum(p.bytes for p in parts),
        sympy.Add(*(p.flops for p in parts)),
        sympy.Add(*(p.kv_bytes for p in parts)),
    )


def _sum(terms: Iterable[Any], rename: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    return sympy.sympify(sympy.Add(*terms)).subs(rename)


def _number(expr: sympy.Expr, sizes: Mapping[str, int]) -> int:
    missing = sorted(str(symbol) for symbol in expr.free_symbols if str(symbol) not in sizes)
    if missing:
        raise KeyError(f"no size given for {', '.join(missing)}")
    return int(expr.subs({symbol: sizes[str(symbol)] for symbol in expr.free_symbols}))
