"""Drafting with the program itself, some of its sub-layers left out: SWIFT (arXiv 2410.06916)."""

from __future__ import annotations

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Input, Program
from graphopt.ir.rewriter import Rewriter
from graphopt.passkit.edits import Skip, apply_edits
from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate.drafter import Rows
from graphopt.runtime.speculate.network import Chain
from graphopt.runtime.speculate.tree import Tree
from graphopt.views import Views

aten = torch.ops.aten
Place = tuple[int, int]
"""A sub-layer: its block and its place in the block."""


class Skipping(Chain):
    """A chain drafter without a share `skip` of the sub-layers between the first and the last block.

    Which ones is searched while it decodes: before a draft, every `interval` steps, another set reads the last
    `context` tokens, and the set whose likeliest tokens are most often those of the sequence drafts from then on. The
    search begins with every second sub-layer and ends at `enough` of them right, after `patience` sets without gain
    (three in four of them random, one in four a neighbour of the best; upstream suggests some by a Gaussian process),
    or when no set is left. Sets are tried in one gated copy of the program, so that only better ones are built.
    Raises PlanError when fewer than one sub-layer can go.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype = torch.float32,
        *,
        skip: float = 0.45,
        length: int = 25,
        stop: float = 0.8,
        leaves: bool = True,
        context: int = 32,
        interval: int = 1,
        enough: float = 0.95,
        patience: int = 300,
        seed: int = 0,
    ) -> None:
        self.program, self.views, self.dtype = program, Views(program), dtype
        self.places = _inner(self.views)
        self.best = _every_second(self.places, skip)
        self.score = -1.0
        self.context, self.interval, self.enough, self.patience = context, interval, enough, patience
        self.tried: set[frozenset[Place]] = set()
        self.stale = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.gated = Decoder(gated(program, self.views, self.places), dtype)
        self.tokens: list[int] = []
        self.steps = 0
        super().__init__(self._build(self.best), part=True, length=length, stop=stop, leaves=leaves)

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Take the program's cache; the search goes on where the last sequence left it."""
        super().begin(prompt, rows)
        self.tokens = list(prompt)

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Remember the sequence."""
        super().observe(rows, path)
        self.tokens += [rows.token[node] for node in path]

    def truncate(self, length: int) -> None:
        """Forget the sequence behind the first `length` tokens."""
        super().truncate(length)
        del self.tokens[length:]

    def propose(self, root: int, budget: int) -> Tree:
        """Try another set when it is time, then draft with the best one."""
        if self.searching and self.steps % self.interval == 0 and len(self.tokens) > self.context:
            self._try(root)
        self.steps += 1
        return super().propose(root, budget)

    @property
    def searching(self) -> bool:
        """Whether better sets are still looked for."""
        return self.score < self.enough and self.stale < self.patience

    def _try(self, root: int) -> None:
        chosen = self.best if self.score < 0 else self._suggest()
        if chosen is None:
            self.stale = self.patience
            return
        self.tried.add(chosen)
        score = self._agreement(chosen, root)
        if score <= self.score:
            self.stale += 1
            return
        self.score, self.stale = score, 0
        if chosen != self.best:
            self.best = chosen
            self.decoder, self._cache = self._build(chosen), None

    def _suggest(self) -> frozenset[Place] | None:
        """A set that was not tried yet, or none when a hundred draws give none."""
        for draw in range(100):
            near = draw % 4 == 3
            order = [self.places[i] for i in torch.randperm(len(self.places), generator=self.generator).tolist()]
            if near:
                kept = [place for place in order if place in self.best][1:]
                order = [*kept, *(place for place in order if place not in self.best)]
            chosen = frozenset(order[: len(self.best)])
            if chosen not in self.tried:
                return chosen
        return None

    def _agreement(self, chosen: frozenset[Place], root: int) -> float:
        """Share of the last tokens that the program without `chosen` finds likeliest; the cache is as it was."""
        cache = self._verified
        assert cache is not None
        gates = torch.tensor([0.0 if place in chosen else 1.0 for place in self.places], dtype=self.dtype)
        trial = self.gated.cache(1, cache.capacity, shared=cache, gates=gates)
        start = len(self.tokens) - self.context
        held = _copy(cache, start, self.context)
        trial.lengths = torch.full_like(cache.lengths, start)
        with torch.no_grad():
            logits = self.gated.step(trial, torch.tensor([self.tokens[start:]]))[0][0]
        for name, part in held.items():
            cache.buffers[name][:, :, start : start + self.context] = part
        wanted = torch.tensor([*self.tokens[start + 1 :], root])
        return float((logits.argmax(dim=-1) == wanted).float().mean())

    def _build(self, chosen: frozenset[Place]) -> Decoder:
        return Decoder(_skipped(self.program, self.views, chosen), self.dtype)


def without(program: Program, share: float) -> Program:
    """The program without a share of the sub-layers between its first and last block, every second one first."""
    views = Views(program)
    return _skipped(program, views, _every_second(_inner(views), share))


def _inner(views: Views) -> list[Place]:
    return [(block.index, part) for block in views.blocks[1:-1] for part in range(len(block.sublayers))]


def _every_second(places: list[Place], share: float) -> frozenset[Place]:
    count = int(len(places) * share)
    if count < 1:
        raise PlanError.of(
            "nothing_to_skip",
            f"a share of {share:g} of {len(places)} sub-layers between the first and the last block is none",
            help=("skip a larger share, or draft another way",),
        )
    return frozenset([*places[1::2], *places[::2]][:count])


def _skipped(program: Program, views: Views, chosen: frozenset[Place]) -> Program:
    edits = []
    for block in views.blocks:
        parts = tuple(part for index, part in sorted(chosen) if index == block.index)
        if parts:
            edits.append(Skip(block.path, block.index, parts))
    return apply_edits(program, views, tuple(edits), "draft")


def gated(program: Program, views: Views, places: list[Place]) -> Program:
    """The program with an input `gates` `[n]`: sub-layer i adds to the stream what it added, times `gates[i]`."""
    rewriter = Rewriter(program)
    gates = rewriter.add_input(Input("gates", (len(places),), program.dtype))
    for i, (index, part) in enumerate(places):
        sublayer = views.blocks[index].sublayers[part]
        before, after = rewriter.node(sublayer.entry), rewriter.node(sublayer.exit)
        delta = rewriter.call(aten.sub.Tensor, after, before, after=after)
        gate = rewriter.call(aten.select.int, gates, 0, i, after=delta)
        scaled = rewriter.call(aten.mul.Tensor, delta, gate, after=gate)
        same = rewriter.call(aten.add.Tensor, before, scaled, after=scaled)
        after.replace_all_uses_with(same, delete_user_cb=lambda user, d=delta: user is not d)
        rewriter.forward(after, same)
    return rewriter.finish()


def _copy(cache: Cache, start: int, count: int) -> dict[str, torch.Tensor]:
    return {name: buffer[:, :, start : start + count].clone() for name, buffer in cache.buffers.items()}
