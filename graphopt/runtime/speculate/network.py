"""Drafting with a program: a smaller model, or a part of the program that verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate.accept import Law
from graphopt.runtime.speculate.drafter import Rows
from graphopt.runtime.speculate.tree import Tree


class Network:
    """What drafting programs share: a cache that follows the sequence.

    A part of the verifying program (`part`) reads and writes the verifying program's own cache: its committed entries
    are the best there are, and what drafting writes behind them is overwritten by the next step. A model of its own has
    its own cache, and a part may have layers of its own: these read kept tokens when a draft is next asked for. Its cache
    is made for the first draft of a sequence, so that a sequence without drafts pays for nothing.
    """

    def __init__(self, decoder: Decoder, *, part: bool) -> None:
        self.decoder, self.part = decoder, part
        self._verified: Cache | None = None
        self._cache: Cache | None = None
        self._text: list[int] = []
        self._known = self._drafted = 0

    @property
    def reads(self) -> int:
        """Nothing: tokens say it all."""
        return 0

    @property
    def _follows(self) -> bool:
        """Whether there are entries that the verifying program does not write, as far as is known."""
        return self._cache is None or self._cache.own

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Take the verifying program's cache and remember the prompt."""
        self._verified, self._cache = rows.cache, None
        self._text, self._known, self._drafted = list(prompt), 0, 0

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Remember what was kept; what drafting read of it along the path need not be read again."""
        if self._follows:
            straight = [i for i, node in enumerate(path[: self._drafted]) if node == i]
            self._known += len(straight)
            self._text += [rows.token[node] for node in path]
            self._drafted = 0

    def truncate(self, length: int) -> None:
        """Forget the entries behind the first `length`."""
        del self._text[length:]
        self._known = min(self._known, length)

    def catch_up(self) -> Cache:
        """The cache, which now holds the sequence without its root."""
        assert self._verified is not None, "begin comes first"
        if self._cache is None:
            shared = self._verified if self.part else None
            self._cache = self.decoder.cache(1, self._verified.capacity, shared=shared)
        if not self._follows:
            self._cache.lengths = self._verified.lengths
            return self._cache
        self._cache.lengths = torch.full_like(self._cache.lengths, self._known)
        if self._known < len(self._text):
            self.read(self._text[self._known :])
            self._cache.commit(len(self._text) - self._known)
            self._known = len(self._text)
        return self._cache

    def read(self, tokens: Sequence[int], parent: tuple[int, ...] | None = None) -> torch.Tensor:
        """Logits `[N, V]` of tokens behind the cache: one behind the other, or a tree by its parents."""
        assert self._cache is not None
        with torch.no_grad():
            ids = torch.tensor([list(tokens)])
            return self.decoder.step(self._cache, ids, parents=None if parent is None else [parent])[0][0]


class Chain(Network):
    """Drafts the likeliest tokens one after the other, at most `length`, and stops behind one less likely than `stop`.

    The unsure token itself is still proposed (Kangaroo, arXiv 2404.18911). With `leaves`, next best tokens stand beside
    each drafted one, the more the less sure it is: 3, 5, 8 or 10 candidates in all above 0.95, 0.8, 0.5 and below
    (SWIFT, arXiv 2410.06916), as far as the budget goes, the first places first.
    """

    def __init__(
        self, decoder: Decoder, *, part: bool, length: int = 6, stop: float = 0.6, leaves: bool = False
    ) -> None:
        super().__init__(decoder, part=part)
        self.length, self.stop, self.leaves = length, stop, leaves

    def propose(self, root: int, budget: int) -> Tree:
        """A chain with its leaves, of at most `budget` nodes."""
        cache, token, beside = self.catch_up(), [root], list[list[int]]()
        start = cache.lengths
        for _ in range(min(self.length, budget - 1)):
            logits = self.read(token[-1:])[0]
            best = torch.softmax(logits.float(), dim=-1).topk(10 if self.leaves else 1)
            sure = float(best.values[0])
            words: list[int] = best.indices.tolist()
            token.append(words[0])
            beside.append(words[1 : _candidates(sure)])
            if sure < self.stop:
                break
            cache.commit(1)
        cache.lengths = start
        self._drafted = len(beside)
        parent = list(range(-1, len(token) - 1))
        for above, words in enumerate(beside if self.leaves else ()):
            for word in words[: budget - len(token)]:
                token.append(word)
                parent.append(above)
        return Tree(tuple(token), tuple(parent))


def _candidates(sure: float) -> int:
    return next((count for bound, count in ((0.95, 3), (0.8, 5), (0.5, 8)) if sure > bound), 10)


@dataclass
class _Beams:
    """A tree under growth: the log-probability and the perturbed score of every node."""

    token: list[int]
    parent: list[int] = field(default_factory=lambda: [-1])
    mass: list[float] = field(default_factory=lambda: [0.0])
    score: list[float] = field(default_factory=lambda: [0.0])


class Sampled(Network):
    """Draws a tree without replacement (recursive speculative decoding, arXiv 2402.14160).

    `constant` draws `branching[l]` children of every node of level l by Gumbel-Top-k on log q. `beam` keeps the
    `branching[l]` best of a level by stochastic beam search: a child's score is a Gumbel of its path's log-probability
    whose maximum over the siblings is the parent's score. Siblings stand in drawing order, and the tree carries q, which
    Exact acceptance needs; `law` maps the draft's logits to q.
    """

    def __init__(
        self,
        decoder: Decoder,
        law: Law,
        generator: torch.Generator,
        *,
        part: bool,
        branching: tuple[int, ...] = (2, 2),
        mode: Literal["constant", "beam"] = "constant",
    ) -> None:
        super().__init__(decoder, part=part)
        if not branching or min(branching) < 1:
            raise ValueError(f"every level draws at least one token, not {branching}")
        self.law, self.generator, self.branching, self.mode = law, generator, branching, mode

    def propose(self, root: int, budget: int) -> Tree:
        """A tree of at most `budget` nodes, level by level as far as whole levels of one node more fit."""
        found, level, laws = _Beams([root]), [0], list[torch.Tensor]()
        self.catch_up()
        for count in self.branching:
            if len(found.token) >= budget:
                break
            # A law is computed once: what a node's children were drawn from is what acceptance divides by.
            laws += self.law(self.read(found.token, tuple(found.parent))[len(laws) :])
            made = len(found.token)
            for parent, token, mass, score in self._children(found, level, laws, count)[: budget - made]:
                found.token.append(token)
                found.parent.append(parent)
                found.mass.append(mass)
                found.score.append(score)
            level = list(range(made, len(found.token)))
        if not laws:
            return Tree.root(root)
        blank = torch.zeros_like(laws[0])
        q = torch.stack([*laws, *(blank for _ in range(len(found.token) - len(laws)))])
        return Tree(tuple(found.token), tuple(found.parent), q)

    def _children(
        self, found: _Beams, level: list[int], laws: list[torch.Tensor], count: int
    ) -> list[tuple[int, int, float, float]]:
        """Parent, token, log-probability and score of the next level's nodes, siblings in drawing order."""
        drawn: list[tuple[int, int, float, float]] = []
        for node in level:
            logs = laws[node].log()
            mass = logs + found.mass[node]
            gumbel = -torch.log(-torch.log(torch.rand(logs.shape, generator=self.generator, dtype=logs.dtype)))
            scores = mass + gumbel
            if self.mode == "beam":
                scores = _given_maximum(scores, found.score[node])
            best = scores.topk(min(count, int((laws[node] > 0).sum())))
            for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                drawn.append((node, token, float(mass[token]), score))
        if self.mode == "beam":
            drawn = sorted(drawn, key=lambda child: -child[3])[:count]
        return drawn


def _given_maximum(scores: torch.Tensor, maximum: float) -> torch.Tensor:
    """Gumbels `[V]` moved so that their largest is `maximum` (stochastic beams, arXiv 1903.06059)."""
    largest = scores.max()
    shift = maximum - scores + torch.log1p(-torch.exp(scores - largest))
    return maximum - shift.clamp_min(0) - torch.log1p(torch.exp(-shift.abs()))
