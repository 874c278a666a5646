"""The edit that gives an attention its slots in the cache, and what all of them share: the new inputs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.leaving import Prompt, moves_up
from graphopt.ir.program import Dim, Input, Program
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.cache.places import Frame, Places, Unplaceable
from graphopt.passes.cache.sequence import CORES, Sequence, expression, packet
from graphopt.passkit.edits import Edit
from graphopt.views import Views

aten = torch.ops.aten
ops = torch.ops.graphopt
CAPACITY = Dim("C", 1, 1 << 24, 29)
_SHARED = "insert_cache"
TEXT = ("tokens", "padding", "positions")


@dataclass(frozen=True, eq=False)
class Slot(Edit):
    """Keep the keys and values of one attention in buffers: `node` is its core, `index` the number of its buffers.

    `keys` and `values` are `(heads, size)` of an entry.
    """

    view: str
    node: str
    index: int
    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: torch.dtype
    level: int = 0
    """behind how many stages at which tokens leave"""

    @property
    def candidate(self) -> str:
        """The attention."""
        return self.view

    @property
    def grows(self) -> bool:
        """Whether its buffers are as long as the text may become."""
        return True

    def describe(self) -> str:
        """What an entry holds."""
        (heads, size), (_, value_size) = self.keys, self.values
        return f"{self.view}: cache {self.index}, {heads} KV heads of {size} + {value_size}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "slot",
            "view": self.view,
            "node": self.node,
            "cache": self.index,
            "keys": list(self.keys),
            "values": list(self.values),
            **({"stages": self.level} if self.level else {}),
        }

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The attention writes its new entries into the buffers and reads the committed ones there."""
        stage = Stage.of(rewriter, views.program)
        buffers = stage.buffers(self)
        core = rewriter.node(self.node)
        q, k, v, _, sinks, scale, _, window, softcap = core.args
        mask = stage.mask(views.program.nodes[self.node])
        made = rewriter.call(
            torch.ops.graphopt.cached_attention.default,
            q, k, v, *buffers, *stage.held_at(self.level), mask, sinks, scale, window, softcap,
            before=core,
        )  # fmt: skip
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """The same by a mask: attention over all slots and the new entries behind them, nothing written."""
        stage = Stage.of(rewriter, views.program)
        keys, values = stage.buffers(self)
        core = rewriter.node(self.node)
        q, k, v, _, sinks, scale, _, window, softcap = core.args

        def call(target: Any, *args: Any) -> fx.Node:
            return rewriter.call(target, *args, before=core)

        visible = stage.visible(call, window, self.level, keys)  # type: ignore[arg-type]
        mask = stage.mask(views.program.nodes[self.node])
        if mask is not None:
            visible = stage.meet(call, visible, mask, views.program.nodes[self.node].args[3])
        made = call(
            torch.ops.graphopt.attention.default,
            q, call(aten.cat.default, [keys, k], 2), call(aten.cat.default, [values, v], 2), visible, sinks, scale,
            False, None, softcap,
        )  # fmt: skip
        rewriter.replace(core, made)


class Stage:
    """What the slots of one rewrite share: tokens' places and lengths as inputs, and expressions that read them."""

    def __init__(self, rewriter: Rewriter, program: Program) -> None:
        self.rewriter = rewriter
        tokens = tokens_of(program)
        assert tokens is not None
        self.sequence = Sequence(program, tokens)
        batch, length = tokens.shape[:2]
        given = {spec.role: spec for spec in program.entry.inputs if spec.shape[:2] == tokens.shape}
        for spec in program.entry.inputs:
            if spec.role in TEXT and spec.shape[:2] != tokens.shape:
                # Another text does not grow: what is computed from it is computed once.
                rewriter.set_role(spec.name, "values")
        if "positions" in given:
            self.positions = rewriter.node(rewriter.input_node(given["positions"].name))
        else:
            self.positions = rewriter.add_input(Input("positions", (batch, length), torch.int64, "positions"))
        self.lengths = rewriter.add_input(Input("lengths", (batch,), torch.int64, "lengths"))
        self.spans = rewriter.add_input(Input("spans", (batch, 2, length), torch.int64, "spans"))
        rewriter.add_dim(CAPACITY)
        self.batch = batch
        self._levels: list[tuple[fx.Node, fx.Node, fx.Node]] = [(self.lengths, self.positions, self.spans)]
        self._held: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self._behind: dict[int, Places] = {}
        self.prompt: Prompt | None = None
        if self.sequence.leaving is not None:
            self._leave()
        self._places: Places | None = None
        self._tokens = rewriter.input_node(tokens.name)
        self._padding = given.get("padding")

    @staticmethod
    def of(rewriter: Rewriter, program: Program) -> Stage:
        """The stage of a rewrite, made by the first slot."""
        if _SHARED not in rewriter.shared:
            rewriter.shared[_SHARED] = Stage(rewriter, program)
        found: Stage = rewriter.shared[_SHARED]
        return found

    def _leave(self) -> None:
        """The prompt and, behind each stage, what the caches hold, new tokens' places there and who sees whom."""
        found, rewriter = self.sequence.leaving, self.rewriter
        assert found is not None
        self.prompt = prompt = Prompt(rewriter, found)
        held = [
            rewriter.add_input(Input(f"entries_{level}", (self.batch,), torch.int64, "entries"))
            for level in range(1, len(found.sizes))
        ]
        last = prompt.last

        def call(target: Any, *args: Any) -> fx.Node:
            nonlocal last
            last = rewriter.call(target, *args, after=last)
            return last

        depth = call(aten.sub.Tensor, self.positions, call(aten.unsqueeze.default, self.lengths, 1))
        for level, (entries, count, real) in enumerate(zip(held, prompt.lengths[1:], prompt.real, strict=True), 1):
            rewriter.add_dim(Dim(f"{CAPACITY.name}{level}", CAPACITY.low, CAPACITY.high, CAPACITY.hint))
            # A prompt is a chain, and behind it nothing leaves, so that the first places say how deep all stand.
            part = call(aten.slice.Tensor, depth, 1, 0, count)
            places = call(aten.add.Tensor, call(aten.unsqueeze.default, entries, 1), part)
            self._levels.append((entries, places, call(aten.slice.Tensor, self.spans, 2, 0, count)))
            kept = rewriter.call(aten.sum.dim_IntList, real, [1], after=real)
            rewriter.add_output(f"kept_{level}", kept)
        for entries, places, rows in self._levels[: found.past]:
            # Behind the prompt they hold what has not left by then, so that slots are counted as there.
            count = call(aten.sym_size.int, places, 1)
            part = call(aten.slice.Tensor, depth, 1, 0, count)
            entries = held[found.past - 1]
            places = call(aten.add.Tensor, call(aten.unsqueeze.default, entries, 1), part)
            self._held.append((entries, places, rows))
        prompt.last = last
        taken: fx.Node | None = None
        for level in range(found.past, 0, -1):
            index = rewriter.node(found.stages[level - 1])
            if taken is not None:
                index = rewriter.call(ops.take_tokens.default, index, taken, 1, after=taken)
            taken = index
            rewriter.add_output(f"stay_{level - 1}", taken)

    def held_at(self, level: int) -> tuple[fx.Node, fx.Node, fx.Node]:
        """How many entries a cache behind so many stages holds, the slots behind them, and who sees whom."""
        return self._held[level] if level < len(self._held) else self._levels[level]

    def buffers(self, slot: Slot) -> tuple[fx.Node, ...]:
        """Inputs for the keys and values of a slot, where it grows."""
        if not slot.grows:
            if self._places is None:
                self._begin(None)
            return ()
        capacity = f"{CAPACITY.name}{slot.level or ''}"
        keys, values = (
            self.rewriter.add_input(
                Input(f"cache_{slot.index}_{kind}", (self.batch, heads, capacity, size), slot.dtype, "cache")
            )
            for kind, (heads, size) in (("keys", slot.keys), ("values", slot.values))
        )
        if self._places is None:
            self._begin(keys)
        return keys, values

    def _begin(self, keys: fx.Node | None) -> None:
        """Turn everything outside of attention that counts places to the new inputs."""
        rewriter, sequence = self.rewriter, self.sequence
        last = [node for node in rewriter.graph.nodes if node.op == "placeholder"][-1]
        if self.prompt is not None:
            last = self.prompt.last
        batch = rewriter.call(aten.sym_size.int, self._tokens, 0, after=last)
        length = rewriter.call(aten.sym_size.int, self._tokens, 1, after=batch)
        # Without a growing buffer no attention reads a table by key position.
        capacity = length if keys is None else rewriter.call(aten.sym_size.int, keys, 2, after=length)
        rows = rewriter.call(operator.mul, batch, length, after=capacity)
        frame = Frame(self.positions, batch, length, capacity, rows)
        self._places = places = Places(rewriter, sequence, frame, rows)
        originals = list(sequence.program.graph.graph.nodes)
        for node in originals:
            if sequence.leaving is not None and moves_up(node):
                self._move_up(node, frame)
                continue
            if sequence.leaving is not None and node in sequence.leaving.needed - sequence.leaving.carrying:
                continue
            if node not in sequence.live & sequence.needed or node.op != "call_function":
                continue
            for source in node.all_input_nodes:
                mask = node.target in CORES and source is node.args[3]
                if source in sequence.placed and not (mask or moves_up(source) or places.native(source)):
                    made = places.rows(source, node)
                    rewriter.node(node).replace_input_with(rewriter.node(source), made)
        self._natives(originals, batch, length)

    def _move_up(self, node: fx.Node, frame: Frame) -> None:
        """What belongs to the places that tokens move up to: that of their places behind the stage."""
        rewriter, found, prompt = self.rewriter, self.sequence.leaving, self.prompt
        assert found is not None
        assert prompt is not None
        source, _, axis = node.args
        level = found.level(node.meta["val"].shape[axis])
        if source not in self.sequence.placed or not level:
            raise Unplaceable(node, "takes something else than what belongs to places")
        if level not in self._behind:
            count = prompt.lengths[level]
            rows = rewriter.call(operator.mul, frame.batch, count, after=frame.rows)
            behind = Frame(self._levels[level][1], frame.batch, count, frame.capacity, rows)
            self._behind[level] = Places(rewriter, self.sequence, behind, rows)
        rewriter.replace(rewriter.node(node), self._behind[level].rows(source, node))  # type: ignore[arg-type]

    def _natives(self, originals: list[fx.Node], batch: fx.Node, length: fx.Node) -> None:
        """Padding is ones, its count the positions, and sizes come from the tokens."""
        rewriter, sequence, places = self.rewriter, self.sequence, self._places
        assert places is not None
        known = {sequence.batch: batch, sequence.length: length}
        for node in originals:
            if packet(node) is aten.sym_size and node.args[0] is not sequence.placeholder:
                size = self._size(expression(node.meta["val"]), known)
                if size is not None:
                    rewriter.node(node).replace_all_uses_with(size)
            elif node in sequence.placed and places.native_count(node) and self._is_needed(node):
                today = rewriter.node(node)
                counted = rewriter.call(aten.add.Tensor, self.positions, 1, after=places.frame.rows)
                today.replace_all_uses_with(counted)
        if self._padding is not None:
            dtype = self._padding.dtype
            padding = rewriter.input_node(self._padding.name)
            ones = rewriter.call(aten.ones_like.default, self._tokens, after=places.frame.rows)
            if dtype != torch.int64:
                ones = rewriter.call(aten.to.dtype, ones, dtype, after=ones)
            padding.replace_all_uses_with(ones)
            rewriter.drop_input(self._padding.name)

    def _is_needed(self, node: fx.Node) -> bool:
        found = self.sequence.leaving
        return found is None or node in found.carrying

    def _size(self, size: sympy.Expr, known: dict[sympy.Expr, fx.Node]) -> fx.Node | None:
        """A multiple of the batch or of the number of tokens, as a node; None for any other size."""
        assert self._places is not None
        for symbol, node in known.items():
            factor = sympy.simplify(size / symbol)
            if factor == 1:
                return node
            if factor.is_Integer:
                return self.rewriter.call(operator.mul, node, int(factor), after=self._places.frame.rows)
        return None

    def mask(self, core: fx.Node) -> fx.Node | None:
        """Today's mask of an attention of the original program by key position; None when lengths say it all."""
        mask = core.args[3]
        if not isinstance(mask, fx.Node) or mask.meta["val"].dim() == 2:
            return None
        assert self._places is not None
        return self._places.mask(mask)

    def visible(self, call: Any, window: int | None, level: int, keys: fx.Node) -> fx.Node:
        """Which of C slots and S new entries each new token sees, `[B, 1, S, C + S]`, behind so many stages."""
        assert self._places is not None
        frame, (lengths, positions, spans) = self._places.frame, self.held_at(level)
        length, capacity = frame.length, frame.capacity
        if self.prompt is not None and level:
            length, capacity = self.prompt.lengths[level], call(aten.sym_size.int, keys, 2)
        cpu = torch.device("cpu")
        slots = call(aten.arange.start_step, 0, capacity)
        slots.kwargs = {"dtype": torch.int64, "device": cpu}
        committed = call(aten.lt.Tensor, slots, call(aten.unsqueeze.default, lengths, 1))
        old = call(aten.expand.default, call(aten.unsqueeze.default, committed, 1), [frame.batch, length, capacity])
        entry, left = (call(aten.select.int, spans, 1, side) for side in (0, 1))
        own = call(aten.unsqueeze.default, entry, 2)
        entered = call(aten.le.Tensor, call(aten.unsqueeze.default, entry, 1), own)
        inside = call(
            aten.logical_and.default, entered, call(aten.lt.Tensor, own, call(aten.unsqueeze.default, left, 1))
        )
        new = call(aten.expand.default, inside, [frame.batch, length, length])
        if window is not None:
            first = call(aten.unsqueeze.default, call(aten.sub.Tensor, positions, window), 2)
            old = call(aten.logical_and.default, old, call(aten.gt.Tensor, slots, first))
            own = call(aten.unsqueeze.default, positions, 1)
            new = call(aten.logical_and.default, new, call(aten.gt.Tensor, own, first))
        return call(aten.unsqueeze.default, call(aten.cat.default, [old, new], 2), 1)  # type: ignore[no-any-return]

    def meet(self, call: Any, visible: fx.Node, mask: fx.Node, original: Any) -> fx.Node:
        """Visibility with a mask by key position, `[B or 1, H or 1, S, C]`, over slots and new entries."""
        assert self._places is not None
        frame = self._places.frame
        heads, value = original.meta["val"].shape[1], original.meta["val"]
        wide = call(aten.expand.default, mask, [frame.batch, heads, frame.length, frame.capacity])
        index = call(aten.reshape.default, self.positions, [frame.batch, 1, 1, frame.length])
        index = call(aten.expand.default, index, [frame.batch, heads, frame.length, frame.length])
        both = call(aten.cat.default, [wide, call(aten.gather.default, wide, 3, index)], 3)
        if value.dtype == torch.bool:
            return call(aten.logical_and.default, both, visible)  # type: ignore[no-any-return]
        hidden = call(aten.logical_not.default, visible)
        return call(aten.masked_fill.Scalar, both, hidden, torch.finfo(value.dtype).min)  # type: ignore[no-any-return]


def tokens_of(program: Program) -> Input | None:
    """The input that takes the tokens `[B, S]` of the text that grows, when there is exactly one.

    Of several texts (an encoder's and a decoder's) it is the one whose tokens the first result counts.
    """
    found = [spec for spec in program.entry.inputs if spec.role == "tokens" and len(spec.shape) == 2]
    if len(found) > 1:
        shape = program.output_nodes[0].meta["val"].shape
        counted = expression(shape[1]) if len(shape) == 3 else None
        sizes = {n.meta["input"]: n.meta["val"].shape for n in program.graph.graph.nodes if "input" in n.meta}
        found = [spec for spec in found if expression(sizes[spec.name][1]) == counted]
    return found[0] if len(found) == 1 and all(isinstance(size, str) for size in found[0].shape) else None
