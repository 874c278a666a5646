"""Planning of quantisation: which matrices, in how many bits; and the edit that packs one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.ir.expressions import Cat, Const, Expr, Take
from graphopt.ir.packed import Packed
from graphopt.ir.rewriter import Rewriter
from graphopt.observe import Tap
from graphopt.ops.quantised import row_bytes
from graphopt.passes.weights.quantize import ExpertBits, Quantize
from graphopt.passkit import Context
from graphopt.passkit.edits import Decline, Edit, Plan
from graphopt.select.allocate import best_widths
from graphopt.select.expert_rows import ExpertRows, row_taps
from graphopt.select.score import routing_tap
from graphopt.views import Block, Experts, FeedForward, Linear, Views

aten = torch.ops.aten
_PRODUCTS = (aten.bmm, aten.matmul, aten.baddbmm, aten.einsum, aten._grouped_mm)
_CARRIED = (aten.index, aten.index_select, aten.transpose, aten.mT, aten.permute, aten.to, aten.contiguous, aten.clone)


@dataclass(frozen=True, eq=False)
class Pack(Edit):
    """Store one weight in `bits` by groups; one width for all of it, or one for each matrix of a bank.

    `turned` says that the axis that products sum over is the one before the last.
    """

    weight: str
    bits: int | tuple[int, ...]
    group: int
    turned: bool
    sizes: tuple[int, ...]
    bank: bool = False

    @property
    def candidate(self) -> str:
        """The weight."""
        return self.weight

    def describe(self) -> str:
        """How many bits, and the bytes of the codes."""
        if isinstance(self.bits, int):
            return f"{self.weight}: {self.bits} bits by {self.group}"
        return f"{self.weight}: {', '.join(map(str, self.bits))} bits by {self.group}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        bits = self.bits if isinstance(self.bits, int) else list(self.bits)
        return {"edit": "pack", "weight": self.weight, "bits": bits, "group": self.group, "turned": self.turned}

    def code_bits(self) -> int:
        """Bits of all codes, without scales."""
        last = self.sizes[-2 if self.turned else -1]
        rows = int(torch.Size(self.sizes).numel()) // last
        if isinstance(self.bits, int):
            return 8 * rows * row_bytes(last, self.bits)
        return sum(8 * (rows // len(self.bits)) * row_bytes(last, bits) for bits in self.bits)

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Let what read the weight read what its packed form stands for."""
        today = rewriter.weight_node(self.weight)
        first = next(node for node in rewriter.graph.nodes if today in node.all_input_nodes)
        expr = rewriter.weights[self.weight].expr
        if isinstance(self.bits, int):
            made = self._unpacked(rewriter, self.weight, expr, self.bits, first)
        else:
            pieces, order = [], []
            for bits, members in _by_width(self.bits):
                order += members
                part = Take(expr, 0, tuple(members))
                pieces.append(self._unpacked(rewriter, f"{self.weight}.width{bits}", part, bits, first))
            made = pieces[0] if len(pieces) == 1 else rewriter.call(aten.cat.default, pieces, 0, before=first)
            if order != sorted(order):
                back = torch.tensor(order).argsort()
                table = rewriter.add_weight(f"{self.weight}.order", Const(back, torch.int64), "buffer")
                made = rewriter.call(aten.index_select.default, made, 0, table, before=first)
        rewriter.replace(today, made)

    def _unpacked(self, rewriter: Rewriter, name: str, expr: Expr, bits: int, before: fx.Node) -> fx.Node:
        parts = [
            rewriter.add_weight(f"{name}.{what}", Packed(expr, what, bits, self.group, self.turned), "buffer")
            for what in ("codes", "scale", "low")
        ]
        size = expr.shape[-2 if self.turned else -1]
        made = rewriter.call(torch.ops.graphopt.dequantise.default, *parts, bits, self.group, size, before=before)
        return rewriter.call(aten.transpose.int, made, -2, -1, before=before) if self.turned else made

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Round the values of the weight and leave it as it is stored."""

        def rounded(expr: Expr) -> Expr:
            if isinstance(self.bits, int):
                return Packed(expr, "value", self.bits, self.group, self.turned)
            each = (
                Packed(Take(expr, 0, (i,)), "value", bits, self.group, self.turned) for i, bits in enumerate(self.bits)
            )
            return Cat(tuple(each), 0)

        rewriter.set_weight(self.weight, rounded)


def _by_width(bits: tuple[int, ...]) -> Iterator[tuple[int, list[int]]]:
    for width in sorted(set(bits)):
        yield width, [i for i, each in enumerate(bits) if each == width]


def taps(config: Quantize, context: Context) -> tuple[Tap, ...]:
    """Rows that experts read, their routing, and what each choice counts, for the banks that get widths of their own."""
    if config.experts is None:
        return ()
    found: dict[Tap, None] = {}
    for bank in _banks(context):
        found.update(dict.fromkeys((routing_tap(bank), *row_taps(bank))))
    return tuple(found)


def _banks(context: Context) -> list[Experts]:
    blocks = context.views.blocks
    return [b for block in blocks for b in block.experts if _covered(context, block, b.path)]


def _covered(context: Context, block: Block, *paths: str) -> bool:
    return any(context.covers(block.index, path) for path in (*paths, block.path))


def plan(config: Quantize, context: Context) -> Plan:
    """A `Pack` for every matrix that products read, a reason for each that stays."""
    views, edits, declines = context.views, [], []
    program, places = views.program, _places(context)
    weights = program.weight_nodes
    for name, weight in program.weights.weights.items():
        shape = weight.expr.shape
        if weight.kind != "parameter" or len(shape) < 2:
            continue
        place = places.get(name, "no matrix product is seen to read it")
        reason = place if isinstance(place, str) else _reason(config, place, weights[name], bool(weight.aliases))
        if reason is not None:
            declines.append(Decline(name, reason))
            continue
        assert not isinstance(place, str)
        turned = place.linear.in_axis == len(shape) - 2
        edits.append(Pack(name, config.bits, config.group, turned, shape, place.linear.bank))
    if "experts" in config.parts:
        _check_banks(context, {edit.weight for edit in edits}, {d.candidate: d.reason for d in declines})
    notes: dict[str, Any] = {}
    if config.experts is not None:
        edits, notes = _mixed(config, config.experts, context, edits)
    held = sum(torch.Size(edit.sizes).numel() for edit in edits)
    bits = sum(edit.code_bits() for edit in edits) / held if held else 0.0
    notes |= {"covered": held, "parameters": program.weights.parameters, "code_bits_per_weight": bits}
    return Plan(tuple(edits), tuple(declines), notes)


@dataclass(frozen=True)
class _Place:
    """Where a matrix stands: the product that reads it, and whether that is a router."""

    linear: Linear
    router: bool


def _places(context: Context) -> dict[str, _Place | str]:
    """For each weight of a product in a layer, where it stands, or why it is not covered."""
    views = context.views
    found: dict[str, _Place | str] = {}
    routers = {bank.router.weight for bank in views.experts if bank.router is not None}
    parts = _parts(views)
    for linear in (*views.labels.linears.values(), *views.labels.bank_linears.values()):
        block, known = views.block_of(linear.node), found.get(linear.weight)
        if block is None and (linear.weight not in parts or not _everywhere(context)):
            # Where two runs share their layers no block is found, but the parts of layers are.
            found.setdefault(linear.weight, "it lies outside the layers")
        elif block is not None and not _covered(context, block, parts.get(linear.weight, block.path)):
            found.setdefault(linear.weight, "outside `where`")
        elif isinstance(known, _Place) and known.linear.in_axis != linear.in_axis:
            found[linear.weight] = "products sum over either axis of it"
        else:
            found[linear.weight] = _Place(linear, linear.weight in routers)
    return found


def _everywhere(context: Context) -> bool:
    return not context.paths and len(context.layers) == len(context.views.blocks)


def _parts(views: Views) -> dict[str, str]:
    """Paths of the views that matrices belong to."""
    found: dict[str, str] = {}
    for attention in views.attentions:
        for linear in (attention.q, attention.k, attention.v, attention.o):
            if linear is not None:
                found[linear.weight] = attention.path
    held: tuple[FeedForward | Experts, ...] = (*views.feed_forwards, *views.experts)
    for part in held:
        for linear in (part.up, part.gate, part.down):
            if linear is not None:
                found[linear.weight] = part.path
    for bank in views.experts:
        if bank.router is not None:
            found[bank.router.weight] = bank.path
    return found


def _reason(config: Quantize, place: _Place, node: fx.Node, tied: bool) -> str | None:
    if place.router:
        return "it is a router: small differences decide what it chooses"
    part = "experts" if place.linear.bank else "products"
    if part not in config.parts:
        return f"{part} are not among the parts"
    if tied or any(user.target is aten.embedding.default for user in node.users):
        return "it is tied to a table that is looked up"
    return None


def _check_banks(context: Context, covered: set[str], reasons: dict[str, str]) -> None:
    """Raise PlanError for a bank of matrices in a covered layer that no edit rounds."""
    views = context.views
    for name, node in views.program.weight_nodes.items():
        weight = views.program.weights[name]
        if weight.kind != "parameter" or len(weight.expr.shape) != 3 or name in covered:
            continue
        product, reason = _product_of(node), reasons.get(name, "")
        if product is None or reason == "outside `where`":
            continue
        block = views.block_of(product)
        if block is not None and not _covered(context, block):
            continue
        raise PlanError.of(
            "uncovered_bank",
            f"the bank of matrices {name!r} {list(weight.expr.shape)} would stay as it is: {reason}",
            notes=(f"read by %{product.name} at {product.meta.get('path', product.name)}",),
            help=("leave its layer out with `where`, or experts with `parts: [products]`",),
        )


def _product_of(node: fx.Node) -> fx.Node | None:
    """The first matrix product that reads a bank, through choices of its matrices and changes of layout."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            packet = getattr(user.target, "overloadpacket", None)
            if packet in _PRODUCTS:
                return user
            if packet in _CARRIED and user not in seen:
                seen.add(user)
                stack.append(user)
    return None


def _mixed(
    config: Quantize, options: ExpertBits, context: Context, edits: list[Pack]
) -> tuple[list[Pack], dict[str, Any]]:
    """Give the banks of each layer the best widths; what was found goes to the notes."""
    if context.statistics is None:
        raise PlanError.of("no_calibration", "widths for each expert need calibration text")
    widths: dict[str, tuple[int, ...]] = {}
    notes: dict[str, Any] = {}
    for bank in _banks(context):
        tap = routing_tap(bank)
        found = context.statistics.routing(tap.node, str(tap.other))
        errors = ExpertRows(context.program, bank, context.statistics).rounding_errors(options.widths, config.group)
        weight = _share(found.chosen, bank.experts) ** options.frequency
        weight = weight * _share(found.share, bank.experts) ** options.mass
        costs = weight[:, None] * errors**options.error
        chosen = best_widths(costs.numpy(), options.widths, int(options.average * bank.experts), options.required)
        for name in (bank.up.weight, (bank.gate or bank.up).weight, bank.down.weight):
            widths[name] = chosen
        notes[bank.path] = {"widths": list(chosen), "errors": errors.tolist()}
    mixed = [
        Pack(e.weight, widths.get(e.weight, e.bits), e.group, e.turned, e.sizes, e.bank) if e.bank else e for e in edits
    ]
    return mixed, {"experts": notes}


def _share(values: torch.Tensor, experts: int) -> torch.Tensor:
    whole = torch.cat([values, values.new_zeros(experts - len(values))])
    return whole / whole.sum().clamp_min(torch.finfo(torch.float64).tiny)
