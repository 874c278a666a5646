"""Tokens that leave a text: what chooses them, and the same program with a choice that reads the prompt alone.

A text that grows while it is written would be chosen from anew with each token. With a prompt as a further input the
choice is made among its tokens, by its tokens, and whatever comes behind it stays: running the whole text then equals
running the prompt once and every further token by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.follow import Lost, packet
from graphopt.ir.program import Dim, Input, Program
from graphopt.ir.rewriter import Rewriter

aten = torch.ops.aten
ops = torch.ops.graphopt
_CASTS = {aten.to, aten._to_copy, aten.clone, aten.contiguous}
_SKIPPED = {ops.put_tokens: {3}, ops.merge_tokens: {1, 2}, ops.merge_windows: {1}, ops.token_index: {0, 1}}
"""arguments that say which tokens, or how many, and not what they hold"""
PROMPT = "prompt"
OF_PROMPT = ("kept_", "stay_")
"""how results are called that say which tokens of a prompt have stayed"""


@dataclass(frozen=True, eq=False)
class Leaving:
    """The stages of a program from which tokens of its text leave: `stages` are the indices of those that stay.

    `sizes` counts the tokens in front of the first stage and behind each; `needed` are nodes whose values reach a result
    and not the choices alone, and `carrying` those of them that are no places to which tokens move up. Words behind a prompt
    do not see in any layer what has left until the stage `past`; 0 where they see all that a layer has had.
    """

    tokens: Input
    stages: tuple[fx.Node, ...]
    sizes: tuple[sympy.Expr, ...]
    needed: frozenset[fx.Node]
    carrying: frozenset[fx.Node]
    past: int = 0

    def level(self, size: Any) -> int | None:
        """Behind how many stages there are so many tokens; None for any other number."""
        found = size_of(size)
        return next((i for i, each in enumerate(self.sizes) if each == found), None)

    def hides(self, mask: fx.Node) -> bool:
        """Whether a mask `[B, T]` behind a stage hides padding and places without a token, and nothing else."""
        kind = packet(mask)
        if kind in _CASTS:
            return self.hides(mask.args[0])  # type: ignore[arg-type]
        if kind is aten.logical_and:
            return all(self.hides(side) for side in mask.args)  # type: ignore[arg-type]
        if kind is ops.take_tokens:
            return _is_real(mask) or self.hides(mask.args[0])  # type: ignore[arg-type]
        return mask.op == "placeholder" and mask.meta.get("input") != self.tokens.name and "input" in mask.meta


def leaving(program: Program) -> Leaving | None:
    """How tokens of a program's text leave, or are not admitted to caches; None when all stay everywhere.

    Raises Lost where it cannot be told.
    """
    text = [spec for spec in program.entry.inputs if spec.role == "tokens" and len(spec.shape) == 2]
    if len(text) != 1:
        return None
    placeholder = next(n for n in program.graph.graph.nodes if n.meta.get("input") == text[0].name)
    length = size_of(placeholder.meta["val"].shape[1])
    stages = []
    for node in program.graph.graph.nodes:
        if packet(node) is ops.token_index and length in size_of(node.meta["val"].shape[1]).free_symbols:
            stages.append(node)
    if not stages and not admitting(program):
        return None
    sizes = [length]
    for stage in stages:
        if size_of(stage.args[0].meta["val"].shape[1]) != sizes[-1]:
            raise Lost(stage, "does not choose among what the stage before has left")
        sizes.append(size_of(stage.meta["val"].shape[1]))
        if sizes[-1] in sizes[:-1] or not isinstance(stage.args[1], fx.Node):
            raise Lost(stage, "leaves as many tokens as come")
    past = max((i for i, stage in enumerate(stages, 1) if stage.args[2:] == (True,)), default=0)
    return Leaving(text[0], tuple(stages), tuple(sizes), _needed(program), _needed(program, False), past)


def admitting(program: Program) -> list[fx.Node]:
    """Attentions that see only tokens which a predictor admits, stateless ones."""
    return [node for node in program.graph.graph.nodes if node.target is ops.admitted_attention.default]


def moves_up(node: fx.Node) -> bool:
    """Whether a node takes what belongs to the places that tokens move up to."""
    return packet(node) is ops.take_tokens and packet(node.args[1]) is aten.minimum  # type: ignore[arg-type]


def size_of(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size if isinstance(size, sympy.Expr) else size.node.expr if hasattr(size, "node") else sympy.Integer(size)


def _is_real(node: fx.Node) -> bool:
    """Whether a node says which places behind a stage hold a token."""
    if packet(node) is not ops.take_tokens or packet(node.args[1]) is not ops.token_index:  # type: ignore[arg-type]
        return False
    return bool(node.args[0] is node.args[1].args[0])  # type: ignore[union-attr]


def _needed(program: Program, places: bool = True) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(program.output_nodes)
    while stack:
        node = stack.pop()
        kind = packet(node)
        if node in found or kind is aten.sym_size:
            continue
        found.add(node)
        if _is_real(node):
            stack.append(node.args[1])  # type: ignore[arg-type]
            continue
        skipped = _SKIPPED.get(kind, set())
        if kind is aten.masked_fill and _is_nothing(node.args[0]):
            skipped = {0, 1}
        elif moves_up(node) and not places:
            skipped = {1}
        for i, argument in enumerate(node.args):
            if i not in skipped:
                fx.node.map_arg(argument, stack.append)
        fx.node.map_arg(node.kwargs, stack.append)
    return frozenset(found)


def _is_nothing(node: Any) -> bool:
    """Whether a node is a number less itself, which only passes a gradient on."""
    if packet(node) is not aten.sub or len(node.args) != 2:
        return False
    number, same = node.args
    return packet(same) is aten.detach and same.args[0] is number


class Prompt:
    """The prompt as an input of a program under change: choices read it alone, and tokens behind it stay.

    `node` is the input `[B, P]`, 1 at real tokens: the first P of the tokens `[B, S]`. `lengths` are today's numbers of
    tokens at each level, `behind` says at each which of them stand behind the prompt, and `real` behind each stage which
    places hold a token.
    """

    def __init__(self, rewriter: Rewriter, found: Leaving) -> None:
        self.rewriter = rewriter
        tokens = rewriter.input_node(found.tokens.name)
        whole = next(dim for dim in rewriter.program.dims if dim.name == found.tokens.shape[1])
        rewriter.add_dim(Dim("P", 1, whole.high, max(2, whole.hint - 2)))
        self.node = rewriter.add_input(Input(PROMPT, (found.tokens.shape[0], "P"), torch.int64, PROMPT))
        self.last = [node for node in rewriter.graph.nodes if node.op == "placeholder"][-1]
        self.batch = self._call(aten.sym_size.int, tokens, 0)
        length = self._call(aten.sym_size.int, tokens, 1)
        self._given = self._call(aten.sym_size.int, self.node, 1)
        rest = self._call(operator.sub, length, self._given)
        inside = self._call(aten.to.dtype, self.node, torch.bool)
        none = self._call(aten.new_zeros.default, inside, [self.batch, rest])
        all_ = self._call(aten.new_ones.default, inside, [self.batch, rest])
        within = self._call(aten.cat.default, [inside, none], 1)
        empty = self._call(aten.zeros_like.default, inside)
        behind = self._call(aten.cat.default, [empty, all_], 1)
        self.lengths, self._at_prompt = [length], [self._given]
        self.real: list[fx.Node] = []
        self.behind = [behind]
        self._counted: dict[fx.Node, Any] = {}
        self._sizes = found.sizes
        for stage in found.stages:
            stays = self._call(torch.sym_max, self._number(stage.args[1]), 0)
            self._at_prompt.append(stays)
            self.lengths.append(self._call(operator.sub, length, self._call(operator.sub, self._given, stays)))
        self._choose_by(within, found)
        for stage, count in zip(found.stages, self.lengths[1:], strict=True):
            self.behind.append(self._let_stay(stage, count, self.behind[-1], found))
        self._admit(found)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        self.last = self.rewriter.call(target, *args, after=self.last)
        return self.last

    def _number(self, node: Any) -> Any:
        """A number of tokens as it is for the prompt alone."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._counted:
            self._counted[node] = self._count(node)
        return self._counted[node]

    def _count(self, node: fx.Node) -> Any:
        if packet(node) is not aten.sym_size:
            if isinstance(node.meta["val"], torch.Tensor) or node.op != "call_function":
                raise Lost(node, "is no number of tokens")
            return self._call(node.target, *fx.node.map_arg(node.args, self._number))
        source, axis = node.args
        size = size_of(source.meta["val"].shape[axis])  # type: ignore[union-attr,index]
        if size in self._sizes:
            return self._at_prompt[self._sizes.index(size)]
        if "input" not in source.meta:  # type: ignore[union-attr]
            raise Lost(node, "counts something that is computed")
        return self._call(aten.sym_size.int, self.rewriter.node(source), axis)  # type: ignore[arg-type]

    def _choose_by(self, within: fx.Node, found: Leaving) -> None:
        """Choices take the tokens of the prompt for all that are there."""
        names = {spec.name: spec.role for spec in self.rewriter.program.entry.inputs}
        for node in self.rewriter.program.graph.graph.nodes:
            source = node.args[0] if node.args else None
            role = names.get(source.meta.get("input", "")) if isinstance(source, fx.Node) else None
            kind = packet(node)
            there = (kind in _CASTS and role == "padding") or (kind is aten.ones_like and role == "tokens")
            if not there or node.meta["val"].dtype != torch.bool:
                continue
            for user in list(node.users):
                if user not in found.needed:
                    self.rewriter.node(user).replace_input_with(self.rewriter.node(node), within)

    def _admit(self, found: Leaving) -> None:
        """Attentions that see admitted tokens alone see all of the prompt."""
        made: dict[fx.Node, fx.Node] = {}
        for core in admitting(self.rewriter.program):
            admit: fx.Node = core.args[9]  # type: ignore[assignment]
            if admit not in made:
                level = found.level(admit.meta["val"].shape[1])
                if level is None:
                    raise Lost(core, "admits tokens of which it cannot be told whether they stand behind the prompt")
                today = self.rewriter.node(admit)
                inside = self.rewriter.call(aten.logical_not.default, self.behind[level], after=today)
                made[admit] = self.rewriter.call(aten.masked_fill.Scalar, today, inside, 1, after=inside)
            self.rewriter.node(core).replace_input_with(self.rewriter.node(admit), made[admit])

    def _let_stay(self, stage: fx.Node, count: fx.Node, behind: fx.Node, found: Leaving) -> fx.Node:
        """Let what stands behind the prompt stay at a stage; returns which of its places those have."""
        rewriter, today = self.rewriter, self.rewriter.node(stage)
        keep: fx.Node = today.args[0]  # type: ignore[assignment]
        rewriter.node(stage.args[1]).replace_all_uses_with(count)  # type: ignore[arg-type]
        both = rewriter.call(aten.logical_or.default, keep, behind, before=today)
        reals = [user for user in stage.users if _is_real(user)]
        today.args = (both, count, *today.args[2:])
        real = rewriter.call(ops.take_tokens.default, both, today, 1, after=today)
        for old in reals:
            for user in list(old.users):
                if user in found.needed:
                    rewriter.node(user).replace_input_with(rewriter.node(old), real)
        self.real.append(real)
        return rewriter.call(ops.take_tokens.default, behind, today, 1, after=real)


def with_prompt(program: Program) -> Program:
    """The program with its prompt as an input, where that has a say in what leaves or is admitted; else the program itself.

    Raises Lost where it cannot be told which nodes choose.
    """
    found = leaving(program)
    if found is None:
        return program
    rewriter = Rewriter(program)
    prompt = Prompt(rewriter, found)
    if found.past:
        hide_past(rewriter, prompt, found)
    return rewriter.finish()


def hide_past(rewriter: Rewriter, prompt: Prompt, found: Leaving) -> None:
    """Hide in all layers, from what stands behind the prompt, tokens that leave until the stage `found.past`.

    What leaves is known behind the layers that shall not see it: what leads to it is computed twice, first for the choice.
    """
    today = [rewriter.node(stage) for stage in found.stages[: found.past]]
    seen: list[fx.Node] = [today[-1].args[0]]  # type: ignore[list-item]
    last = today[-1]
    for level in range(found.past - 1, 0, -1):
        stage, real = today[level - 1], prompt.real[level - 1]
        seen.insert(0, rewriter.call(ops.put_tokens.default, seen[0], stage, real, stage.args[0], 1, after=last))
        last = seen[0]
    first = _again(rewriter, seen, prompt.last)
    for node in rewriter.program.graph.graph.nodes:
        if node.target not in (
            ops.admitted_attention.default, ops.attention.default, ops.bounded_attention.default,
            ops.quantised_attention.default,
        ):  # fmt: skip
            continue
        rows, columns = (found.level(node.args[i].meta["val"].shape[2]) for i in (0, 1))
        if rows is None or rows != columns or rows >= found.past:
            continue
        if node.target is ops.bounded_attention.default:
            raise Lost(node, "has heads that are bounded, and what leaves later shall not be seen in it either")
        if node.target is ops.admitted_attention.default:
            raise Lost(node, "admits some tokens alone, and what leaves later shall not be seen in it either")
        if node.target is ops.quantised_attention.default:
            raise Lost(node, "has blocks in few bits, and what leaves later shall not be seen in it either")
        core = rewriter.node(node)

        def call(target: Any, *args: Any, core: fx.Node = core) -> fx.Node:
            return rewriter.call(target, *args, before=core)

        words = call(aten.unsqueeze.default, call(aten.unsqueeze.default, prompt.behind[rows], 1), 3)
        there = call(aten.unsqueeze.default, call(aten.unsqueeze.default, first[rows], 1), 1)
        visible = call(aten.logical_or.default, call(aten.logical_not.default, words), there)
        mask, old = core.args[3], node.args[3]
        if isinstance(mask, fx.Node) and old.meta["val"].dim() == 2:
            flat = call(
                aten.to.dtype, call(aten.unsqueeze.default, call(aten.unsqueeze.default, mask, 1), 1), torch.bool
            )
            visible = call(aten.logical_and.default, visible, flat)
        elif isinstance(mask, fx.Node) and old.meta["val"].dtype == torch.bool:
            visible = call(aten.logical_and.default, visible, mask)
        elif isinstance(mask, fx.Node):
            hidden = call(aten.logical_not.default, visible)
            visible = call(aten.masked_fill.Scalar, mask, hidden, torch.finfo(old.meta["val"].dtype).min)
        core.args = (*core.args[:3], visible, *core.args[4:])


def _again(rewriter: Rewriter, wanted: list[fx.Node], after: fx.Node) -> list[fx.Node]:
    """The same values computed once more, right behind a node."""
    order = {node: i for i, node in enumerate(rewriter.graph.nodes)}
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and order[node] > order[after] and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {}
    last = after
    for node in sorted(needed, key=order.__getitem__):
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: copies.get(n, n))
        last = copies[node] = rewriter.call(node.target, *args, after=last)
        last.kwargs = kwargs
    return [copies.get(node, node) for node in wanted]


def rooms(program: Program) -> dict[str, sympy.Expr]:
    """How long caches are that are shorter than the text, by dimension, in the program's other dimensions.

    Behind stages what has left is missing; quantised ones count whole blocks of tokens. Those that take admitted tokens
    alone may have to be as long as the text.
    """
    shapes = {spec.name: spec.shape for spec in program.entry.inputs}
    named: dict[sympy.Expr, sympy.Symbol] = {}
    own: dict[str, sympy.Expr] = {}
    for node in program.graph.graph.nodes:
        if "input" in node.meta:
            for size, name in zip(node.meta["val"].shape, shapes[node.meta["input"]], strict=True):
                if isinstance(name, str):
                    named[size_of(size)] = sympy.Symbol(name, positive=True, integer=True)
    capacity, length = (sympy.Symbol(name, positive=True, integer=True) for name in ("C", "S"))
    for node in program.graph.graph.nodes:
        if node.target is ops.packed_attention.default:
            own[str(shapes[node.args[8].meta["input"]][2])] = sympy.floor(capacity / node.args[18])
        elif node.target is ops.admitting_attention.default:
            # As many as there are tokens, at most.
            own[str(shapes[node.args[5].meta["input"]][2])] = capacity
    if not any(spec.role == PROMPT for spec in program.entry.inputs):
        return own
    for node in program.graph.graph.nodes:
        if node.target is ops.cached_attention.default:
            keys = shapes[node.args[3].meta["input"]]
            count = size_of(node.args[0].meta["val"].shape[2]).subs(named)
            if keys[2] != "C":
                own[str(keys[2])] = capacity - (length - count)
    return own


def room(program: Program, capacity: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Entries that caches behind stages need for texts of `capacity` tokens; as many where `sizes` do not say."""
    found = {}
    for name, size in rooms(program).items():
        given = {"C": capacity, **sizes}
        number = size.subs({symbol: given[str(symbol)] for symbol in size.free_symbols if str(symbol) in given})
        found[name] = max(1, int(number)) if number.is_Integer else capacity
    return found


def losing(program: Program) -> dict[str, tuple[str, str, str]]:
    """Caches in front of a stage that lose what leaves there, once the prompt has run, by their inputs' names.

    For each the result that says which entries stay, the input that counts them, and the dimension that is as long.
    """
    shapes = {spec.name: spec.shape for spec in program.entry.inputs}
    found = {}
    for node in program.graph.graph.nodes:
        if node.target is ops.cached_attention.default:
            level = str(shapes[node.args[3].meta["input"]][2]).removeprefix("C")
            counter = node.args[5].meta["input"]
            stage = counter.removeprefix("entries_")
            if counter.startswith("entries_") and stage != level:
                for buffer in node.args[3:5]:
                    found[buffer.meta["input"]] = (f"stay_{level or 0}", counter, f"C{stage}")
    return found
