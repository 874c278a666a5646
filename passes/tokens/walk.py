"""One walk through a stack of layers from which tokens leave: what its two meanings, gathered and masked, share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.follow import At, Lost, Step, follow, packet, rank
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.tokens.options import Carried, Predictor, Windows
from graphopt.passes.tokens.scores import presence, score_of
from graphopt.passes.tokens.span import NoSpan, find_span
from graphopt.passes.tokens.stage import Selection, Stage
from graphopt.views import Views
from graphopt.views.trace import derives_from

aten = torch.ops.aten
ops = torch.ops.graphopt


class Walk:
    """Visits nodes in graph order and writes their arguments anew.

    `level` counts the stages in front of a node whose result has tokens; `now` is what is read in place of a stream point
    behind a stage. Subclasses say what a stage makes, how attention sees, and what a reader of all tokens reads.
    """

    def __init__(self, rewriter: Rewriter, views: Views, selection: Selection, stages: tuple[Stage, ...]) -> None:
        self.rewriter, self.views, self.selection, self.stages = rewriter, views, selection, stages
        self.span = selection.span
        self.nodes = list(rewriter.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        blocks = self.span.blocks
        self.points = {rewriter.node(blocks[stage.layer].entry): stage for stage in stages}
        self.end = self.order[rewriter.node(blocks[-1].exit)]
        self.known: dict[fx.Node, At | None] = {}
        self.level: dict[fx.Node, int] = {}
        self.now: dict[fx.Node, fx.Node] = {}
        self.count = 0
        self.last: fx.Node = self.nodes[0]
        self.masks: dict[fx.Node, Any] = {}
        """the masks that attentions had, by attention"""
        self.now_at: Stage | None = None
        self.spliced: fx.Node | None = None
        self.inherited: fx.Node | None = None
        """which tokens of the text have not left as patches, `[B, S]`"""
        self.chain: list[tuple[fx.Node, fx.Node]] = []
        """indices and masks by which tokens have left in front of the first stage, in earlier steps"""
        self.presence: fx.Node | None = None
        """one for each token in front of the last stage, where scores learn by it"""
        self._base: dict[str, fx.Node] = {}
        self._sides: dict[tuple[fx.Node, int, int, int], fx.Node] = {}

    # -- what a meaning says ----------------------------------------------------------------------------------------------

    def stage(self, stage: Stage, point: fx.Node) -> fx.Node:
        """Choose tokens at a stream point; returns what is read behind it."""
        raise NotImplementedError

    def sees(self, node: fx.Node, mask: Any, level: int, rows: bool, columns: bool) -> tuple[Any, int | None]:
        """The mask and window of an attention whose queries (`rows`) or keys (`columns`) are tokens of a level."""
        raise NotImplementedError

    def at_level(self, node: fx.Node) -> fx.Node:
        """Numbers `[B, S]` of all tokens for those that are there now."""
        raise NotImplementedError

    def last_place(self) -> fx.Node:
        """Where the last token of each row is now, `[B, 1]`."""
        raise NotImplementedError

    def side(self, operand: fx.Node, axis: int, level: int, count: int) -> fx.Node:
        """Something else with an entry for each token, for the tokens of a level, broadcast to `count` axes."""
        raise NotImplementedError

    def length(self, level: int) -> Any:
        """How many tokens there are at a level, or None when sizes stay."""
        raise NotImplementedError

    def whole(self, node: fx.Node, axis: int, level: int) -> fx.Node:
        """A result of a level with an entry for every token again: zero for those that have left."""
        raise NotImplementedError

    def stays(self, level: int) -> fx.Node:
        """Which of all tokens are there at a level, `[B, S]`."""
        raise NotImplementedError

    def mean(self, node: fx.Node, level: int) -> fx.Node | None:
        """What stands for the mean over the tokens of a level; None when the node does as it is."""
        raise NotImplementedError

    # -- the walk ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Visit every node; raises Lost where tokens meet in a way that is not known."""
        for node in self.nodes:
            if node.op == "output":
                self._outputs(node)
            elif node.op == "call_function":
                if any(self.known.get(source) is not None for source in node.all_input_nodes):
                    self._visit(node)
                if node in self.points:
                    self.last = node
                    self.now_at = stage = self.points[node]
                    made = self.stage(stage, node)
                    self.count += 1
                    self.known[node], self.level[node], self.now[node] = At(1), self.count, made
        if self.count != len(self.stages):
            raise RuntimeError("a stage lies on no node of the graph")

    def _visit(self, node: fx.Node) -> None:
        levels = {self.level[s] for s in node.all_input_nodes if self.known.get(s) is not None}
        if len(levels) > 1:
            raise Lost(node, "joins tokens from in front of a stage with those behind it")
        level = levels.pop()
        self.last = node.prev
        try:
            step = follow(node, self.known)
            self._judge(node, step, level)
        except Lost:
            if self.order[node] <= self.end:
                raise
            self.spliced = self.spliced or self._splice_behind(node)
            self._all(node, level)
            return
        if step.event == "attention":
            self._attend(node, level)
        else:
            self._write(node, step, level)
        if step.event == "reduce" and (made := self.mean(node, level)) is not None:
            node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        self.known[node], self.level[node] = step.at, level

    def _attend(self, node: fx.Node, level: int) -> None:
        q, k, v, mask, *rest = node.args
        self.masks[node] = mask
        rows, columns = (self.known.get(side) is not None for side in (q, k))  # type: ignore[arg-type]
        mask, rest[3] = self.sees(node, mask, level, rows, columns)
        q, k, v = (self.reads(side) for side in (q, k, v))  # type: ignore[arg-type]
        node.args = (q, k, self.given(v, level) if columns else v, mask, *rest)

    def given(self, values: fx.Node, level: int) -> fx.Node:
        """What tokens of a level give to others, `[B, K, L, E]`."""
        return values

    def mask_at(self, core: fx.Node, mask: Any, level: int) -> Any:
        """The mask of an attention that is still to come, for the tokens of a level."""
        return self.sees(core, mask, level, True, True)[0]

    def level_side(self, operand: fx.Node, axis: int, level: int, count: int) -> fx.Node:
        """Something else with an entry for each token, as it is at a level."""
        return self.side(operand, axis, level, count) if level else operand

    def hiding(self, mask: fx.Node, dtype: torch.dtype, seen: fx.Node) -> fx.Node:
        """A mask of four axes, of truth or of addends, that also hides the keys at which `seen` `[B, T]` is false."""
        flat = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, seen, 1), 1)
        return self.joined(mask, dtype, flat)

    def joined(self, mask: fx.Node, dtype: torch.dtype, seen: fx.Node) -> fx.Node:
        """A mask, of truth or of addends, that also hides what `seen` is false at."""
        if dtype == torch.bool:
            return self._and(mask, seen)
        hidden = self.call(aten.logical_not.default, seen)
        return self.call(aten.masked_fill.Scalar, mask, hidden, torch.finfo(dtype).min)

    def _judge(self, node: fx.Node, step: Step, level: int) -> None:
        """Refuse what has no meaning for fewer tokens."""
        if step.event == "splice":
            self.spliced = node
        if step.event in ("slice", "splice"):
            raise Lost(node, "takes a part of the tokens")
        if step.event == "reduce" and (self.span.ragged or packet(node) is not aten.mean):
            raise Lost(node, "runs over the tokens")
        if step.event == "select":
            index = node.args[2]
            if self.span.ragged or not isinstance(index, int) or not 0 <= index < self.span.front:
                raise Lost(node, "takes one token by its place")

    def _write(self, node: fx.Node, step: Step, level: int) -> None:
        sides = {
            operand: self.side(operand, axis, level, max(rank(node), rank(operand)))
            if rank(operand) <= rank(node)
            else operand
            for operand, axis in step.meets
        }
        length = self.length(level)
        args = step.sizes(length) if step.sizes is not None and length is not None else node.args

        def mapped(value: fx.Node) -> fx.Node:
            return sides.get(value) or self.reads(value)

        node.args = fx.node.map_arg(args, mapped)
        node.kwargs = fx.node.map_arg(node.kwargs, mapped)

    def reads(self, node: fx.Node) -> fx.Node:
        """What a reader of a node reads today."""
        return self.now.get(node, node)

    def _all(self, node: fx.Node, level: int) -> None:
        """Let a node behind the layers read all tokens again."""
        for source in list(node.all_input_nodes):
            at = self.known.get(source)
            if at is not None:
                if not at.whole:
                    raise Lost(node, "reads tokens that are merged with another axis")
                self.last = node.prev
                node.replace_input_with(source, self.whole(self.reads(source), at.axis, level))

    def _outputs(self, node: fx.Node) -> None:
        for source in list(node.all_input_nodes):
            at = self.known.get(source)
            if at is not None:
                if not at.whole:
                    raise Lost(source, "is a result in which tokens are merged with another axis")
                self.last = node.prev
                node.replace_input_with(source, self.whole(self.reads(source), at.axis, self.level[source]))

    def _splice_behind(self, node: fx.Node) -> fx.Node | None:
        """Where the results of a stack of patches are written into a text, if they are."""
        if self.span.tokens is not None:
            return None
        seen, stack = {node}, [node]
        while stack:
            for user in stack.pop().users:
                if packet(user) is aten.masked_scatter:
                    return user
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
        return None

    def carry(self) -> None:
        """Let the tokens of a text that stand for patches that have left leave in front of its first layer."""
        if self.spliced is None or self.span.tokens is not None:
            return
        try:
            text = find_span(self.views, "image", 0, 1)
        except NoSpan as reason:
            raise Lost(self.spliced, f"writes patches into a text that they cannot leave: {reason}") from reason
        span, splice = self.span, text.splice
        assert splice is not None
        if self.chain or span.count != span.whole or splice.entries != span.whole:
            raise Lost(self.spliced, "writes patches into a text that are not one token each")
        self.last = self.spliced.prev
        kept = self.call(aten.slice.Tensor, self.stays(self.count), 1, span.front, span.front + span.whole)
        empty = self.call(aten.zeros_like.default, self.rewriter.node(splice.mask), dtype=torch.bool)
        flat = self.call(aten.reshape.default, kept, [-1])
        inherited = self.call(aten.masked_scatter.default, empty, self.rewriter.node(splice.mask), flat)
        selection = Selection(text, Carried(), "drop", self.selection.positions)
        stage = Stage(text.blocks[0].path, 0, (span.stay(self.stages[-1].share), span.whole), selection, [])
        behind = type(self)(self.rewriter, self.views, selection, (stage,))
        behind.inherited = inherited
        behind.run()

    # -- nodes that both meanings need --------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node behind the last one that was made."""
        made = self.rewriter.call(target, *args, after=self.last)
        made.kwargs = kwargs
        self.last = made
        return made

    def base(self, point: fx.Node) -> dict[str, fx.Node]:
        """Masks over the tokens at the first stage `[B, S]`, made there: `real`, `span`, `last`, and `count` `[B]`.

        `count` is of the span in the whole text, so that later steps keep shares of the same number.
        """
        if self._base:
            return self._base
        span, made = self.span, self._base
        self.chain = arrived(point, self.order)
        if span.padding is not None:
            real = self.call(aten.to.dtype, self.rewriter.input_node(span.padding.name), torch.bool)
        elif span.tokens is not None:
            tokens = self.rewriter.input_node(span.tokens.name)
            real = self.call(aten.ones_like.default, tokens, dtype=torch.bool)
        else:
            one = self.call(aten.select.int, point, 2, 0)
            real = self.call(aten.ones_like.default, one, dtype=torch.bool)
        place = self.call(aten.cumsum.default, real, 1)
        if span.splice is not None:
            inside = self.rewriter.node(span.splice.mask)
        elif span.tokens is not None:
            total = self.call(aten.sum.dim_IntList, real, [1], True)
            inside = self.call(aten.gt.Scalar, place, span.first)
            inside = self._and(inside, self.call(aten.le.Tensor, place, self.call(aten.sub.Tensor, total, span.last)))
        else:
            inside = self.call(aten.gt.Scalar, place, span.front)
            inside = self._and(inside, self.call(aten.le.Scalar, place, span.front + span.count))
        inside = self._and(inside, real)
        made["count"] = self.call(aten.sum.dim_IntList, inside, [1])
        if span.tokens is not None:
            for index, keep in self.chain:
                real = self.call(ops.take_tokens.default, keep, index, 1)
                inside = self._and(self.call(ops.take_tokens.default, inside, index, 1), real)
            place = self.call(aten.cumsum.default, real, 1)
            total = self.call(aten.sum.dim_IntList, real, [1], True)
            made["last"] = self._and(self.call(aten.eq.Tensor, place, total), real)
        made["real"], made["span"] = real, inside
        return made

    def _and(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call(aten.logical_and.default, a, b)

    def staying(self, stage: Stage) -> fx.Node:
        """How many tokens of the span stay in each row, int `[B]`."""
        over, under = stage.share
        if self.span.tokens is None:
            over, under = self.span.stay(stage.share), self.span.count
        scaled = self.call(aten.mul.Tensor, self._base["count"], over)
        return self.call(aten.div.Tensor_mode, scaled, under, rounding_mode="floor")

    def choose(self, stage: Stage, x: fx.Node, span: fx.Node, real: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Which tokens stay `[B, S]`, and the stream `[B, S, d]` to take them from."""
        if isinstance(self.selection.score, Carried):
            assert self.inherited is not None
            top = self._and(span, self.inherited)
        else:
            score = score_of(self, stage, x, span, real)
            top = self.call(ops.top_tokens.default, score, span, self.staying(stage))
            if isinstance(self.selection.score, Predictor):
                self.presence = presence(self, score, span)
        outside = self._and(real, self.call(aten.logical_not.default, span))
        return self.call(aten.logical_or.default, outside, top), self.merged(x, span, top)

    def merged(self, x: fx.Node, span: fx.Node, top: fx.Node) -> fx.Node:
        """The stream with what leaves averaged into what stays of the span, where the step says so."""
        if self.selection.action != "merge":
            return x
        gone = self._and(span, self.call(aten.logical_not.default, top))
        if isinstance(self.selection.score, Windows):
            size = self.selection.score.size
            return self.call(ops.merge_windows.default, x, gone, self.span.front, *self.span.grid, size)
        return self.call(ops.merge_tokens.default, x, top, gone)

    def positional(self, node: fx.Node) -> bool:
        """Whether a node says something about places alone: not about tokens, pictures or padding."""
        names = {s.name for s in self.views.program.entry.inputs if s.role not in ("positions",)}
        return not derives_from(node, names)

    def leading(self, operand: fx.Node, axis: int, count: int) -> tuple[fx.Node, int]:
        """An operand with as many axes as its reader, the batch first."""
        for _ in range(count - rank(operand)):
            axis += 1
        made = operand
        for _ in range(count - rank(operand)):
            made = self.call(aten.unsqueeze.default, made, 0)
        if axis == 0:
            raise Lost(operand, "has tokens where others have the batch")
        return made, axis


def arrived(point: fx.Node, order: dict[fx.Node, int]) -> list[tuple[fx.Node, fx.Node]]:
    """The indices by which tokens have left in front of a stream point, with the masks that they are made of."""
    found: list[tuple[fx.Node, fx.Node]] = []
    node: fx.Node | None = point
    while node is not None:
        shape, best, seen, stack = node.meta["val"].shape, None, {node}, [node]
        while stack:
            current = stack.pop()
            value = current.meta.get("val")
            taken = packet(current) is ops.take_tokens and current.args[2] == 1
            if taken and isinstance(value, torch.Tensor) and value.shape == shape:
                chosen = packet(current.args[1]) is ops.token_index  # type: ignore[arg-type]
                if chosen and (best is None or order[current] > order[best]):
                    best = current
                continue
            for source in current.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        node = None
        if best is not None:
            index: fx.Node = best.args[1]  # type: ignore[assignment]
            found.insert(0, (index, index.args[0]))  # type: ignore[arg-type]
            node = best.args[0]  # type: ignore[assignment]
    return found
