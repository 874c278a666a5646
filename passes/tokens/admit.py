"""Words of an answer that later layers' caches take in: a predictor in front of a layer decides about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.diagnostics import PlanError
from graphopt.passes.cache.bounded import fits
from graphopt.passes.tokens.options import Kept, Predictor
from graphopt.passes.tokens.scores import network
from graphopt.passes.tokens.span import NoSpan, Span, find_span
from graphopt.passes.tokens.walk import arrived
from graphopt.passkit.base import Context
from graphopt.passkit.edits import Decline, Edit

if TYPE_CHECKING:
    from graphopt.ir.rewriter import Rewriter
    from graphopt.spec.selectors import Layers
    from graphopt.views import Views

aten = torch.ops.aten
ops = torch.ops.graphopt


@dataclass(frozen=True, eq=False)
class Admit(Edit):
    """Let the attentions `nodes` of one layer see tokens that the predictor in front of layer `layer` admits."""

    view: str
    nodes: tuple[str, ...]
    layer: int
    share: str
    score: Predictor
    span: Span

    @property
    def candidate(self) -> str:
        """The layer."""
        return self.view

    @property
    def weights(self) -> tuple[str, ...]:
        """The predictor's."""
        path = self.span.blocks[self.layer].path
        return tuple(f"{path}.answer.{name}" for name in ("up.weight", "up.bias", "down.weight"))

    def describe(self) -> str:
        """Who decides, and what share it aims at."""
        return (
            f"{self.view}: words behind the prompt that a predictor in front of layer {self.layer} admits, {self.share}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "admit",
            "view": self.view,
            "nodes": list(self.nodes),
            "layer": self.layer,
            "keep": self.share,
            "score": self.score.model_dump(mode="json"),
        }

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The same attention with what is admitted as an argument."""
        admit = self._admit(rewriter, views)
        for name in self.nodes:
            core = rewriter.node(name)
            made = rewriter.call(ops.admitted_attention.default, *core.args[:9], admit, before=core)
            rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """A mask on plain attention."""
        admit = self._admit(rewriter, views)
        for name in self.nodes:
            core = rewriter.node(name)
            q, k, v, padding, sinks, scale, _, _, softcap = core.args[:9]

            def call(target: Any, *args: Any, core: fx.Node = core) -> fx.Node:
                return rewriter.call(target, *args, before=core)

            count = call(aten.sym_size.int, k, 2)
            whole = call(ops.attention_mask.default, q, padding, count, count, True, None)
            own = call(ops.attention_mask.default, q, padding, count, count, True, 1)
            seen = call(aten.unsqueeze.default, call(aten.unsqueeze.default, call(aten.gt.Scalar, admit, 0.5), 1), 1)
            mask = call(aten.logical_or.default, own, call(aten.logical_and.default, whole, seen))
            rewriter.replace(core, call(ops.attention.default, q, k, v, mask, sinks, scale, False, None, softcap))

    def _admit(self, rewriter: Rewriter, views: Views) -> fx.Node:
        """1 for each token `[B, S]` that is admitted, else 0; with the gradient of its probability. Made once."""
        key = f"admit {self.weights[0]}"
        if key in rewriter.shared:
            known: fx.Node = rewriter.shared[key]
            return known
        entry = self.span.blocks[self.layer].entry
        x = last = rewriter.node(entry)

        def call(target: Any, *args: Any) -> fx.Node:
            nonlocal last
            last = rewriter.call(target, *args, after=last)
            last.meta["path"] = f"{self.span.blocks[self.layer].path}.answer"
            return last

        value = views.program.nodes[entry.name].meta["val"]
        score = network(call, rewriter, self.weights, self.score, value, x)
        admitted = call(ops.admit_tokens.default, score)
        made = call(aten.masked_fill.Scalar, admitted, self._unasked(rewriter, call, x, entry), 1)
        rewriter.shared[key] = made
        return made

    def _unasked(self, rewriter: Rewriter, call: Any, x: fx.Node, entry: fx.Node) -> fx.Node:
        """Tokens about which the predictor is not asked, `[B, S]`: those of pictures, and padding."""
        span = self.span
        assert span.tokens is not None
        tokens = rewriter.input_node(span.tokens.name)
        if span.padding is not None:
            real = call(aten.to.dtype, rewriter.input_node(span.padding.name), torch.bool)
            found = call(aten.logical_not.default, real)
        else:
            found = call(aten.to.dtype, call(aten.zeros_like.default, tokens), torch.bool)
        if span.splice is not None:
            pictures = call(aten.eq.Scalar, tokens, span.splice.token)
            found = call(aten.logical_or.default, found, pictures)
        order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
        for index, _ in arrived(entry, order):
            found = call(ops.take_tokens.default, found, rewriter.node(index), 1)
        return found


def admits(context: Context, layers: Layers, score: Predictor, keep: Kept) -> tuple[list[Admit], list[Decline]]:
    """An edit for each layer whose caches may take in some words alone, a decline for every other one."""
    views = context.views
    names = [block.path for block in views.blocks] or ["model"]
    try:
        span = _span(views)
    except NoSpan as reason:
        return [], [Decline(name, str(reason)) for name in names]
    chosen = layers.resolve(len(span.blocks))
    if len(chosen) != 1:
        raise PlanError.of(
            "stage_count",
            f"one predictor decides about the words of an answer, but {len(chosen)} layers are named",
            help=("name the layer in front of which it stands",),
        )
    edits, declines = [], []
    over, under = keep.of(1)
    first = span.blocks[chosen[0]].entry
    for index, block in enumerate(span.blocks):
        if index < chosen[0]:
            declines.append(Decline(block.path, "its caches hold every word"))
        elif over == under:
            declines.append(Decline(block.path, "every word is admitted"))
        elif block.entry.meta["val"].shape[1] != first.meta["val"].shape[1]:
            declines.append(Decline(block.path, "tokens leave between the predictor and it"))
        else:
            reasons = {a.core.name: _unfit(context, a) for a in block.attentions}
            fit = tuple(name for name, reason in reasons.items() if reason is None)
            if fit:
                edits.append(Admit(block.path, fit, chosen[0], str(keep), score, span))
            else:
                found = [reason for reason in reasons.values() if reason is not None]
                declines.append(Decline(block.path, found[0] if found else "it has no attention"))
    declines += [Decline(block.path, "another stack") for block in views.blocks if block not in span.blocks]
    return edits, declines


def _unfit(context: Context, attention: Any) -> str | None:
    """Why an attention cannot see admitted words alone."""
    if attention.core.target is ops.bounded_attention.default:
        return "its heads are bounded, or have gates"
    return fits(context.program, attention, "chosen from")


def _span(views: Views) -> Span:
    """The stack of a text, whether pictures stand in it or not."""
    try:
        return find_span(views, "image", 0, 1)
    except NoSpan:
        return find_span(views, "text", 0, 1)
