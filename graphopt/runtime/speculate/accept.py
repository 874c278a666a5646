"""Acceptance: which path of a tree is kept and which token follows it. Pure functions of tree, logits and randomness."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from graphopt.runtime.speculate.tree import Tree

Law = Callable[[torch.Tensor], torch.Tensor]
"""Logits `[N, V]` to probabilities `[N, V]`, with temperature and cuts applied."""


class Acceptance(Protocol):
    """`lossless` says whether tokens keep the law (or, greedily, the values) of plain decoding."""

    lossless: ClassVar[bool]

    def __call__(self, tree: Tree, logits: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """The kept nodes, root first, and the token behind the last of them."""
        ...

    def first(self, logits: torch.Tensor) -> int:
        """The token behind a prompt, from its last logits `[V]`."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Keep the path of likeliest tokens: the same tokens as plain greedy decoding."""

    lossless: ClassVar[bool] = True

    def __call__(self, tree: Tree, logits: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """The kept nodes and the likeliest token behind them."""
        best: list[int] = logits.argmax(dim=-1).tolist()
        path = [0]
        while True:
            wanted = best[path[-1]]
            child = next((c for c in tree.children[path[-1]] if tree.token[c] == wanted), None)
            if child is None:
                return tuple(path), wanted
            path.append(child)

    def first(self, logits: torch.Tensor) -> int:
        """The likeliest token."""
        return int(logits.argmax())


@dataclass(frozen=True)
class Exact:
    """Recursive rejection: tokens have exactly the law of plain sampling (arXiv 2402.14160; chains: arXiv 2211.17192).

    Siblings are tried in drawing order: x is kept with probability min(1, p(x) / q(x)); when it is refused
    p becomes norm(max(p - q, 0)) and q loses x. A ONE_HOT q puts all its mass on x. What is left of p when no child is
    kept gives the next token.
    """

    law: Law
    generator: torch.Generator = field(compare=False)
    lossless: ClassVar[bool] = True

    def __call__(self, tree: Tree, logits: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """The kept nodes and a token drawn behind them."""
        laws = self.law(logits)
        path = [0]
        while True:
            p = laws[path[-1]].clone()
            q = tree.q[path[-1]].clone() if tree.q is not None else None
            child = self._descend(tree, tree.children[path[-1]], p, q)
            if child is None:
                return tuple(path), self._draw(p)
            path.append(child)

    def _descend(self, tree: Tree, children: tuple[int, ...], p: torch.Tensor, q: torch.Tensor | None) -> int | None:
        """The child that is kept; p is left as the law of the next token when none is."""
        for child in children:
            token = tree.token[child]
            drawn = float(q[token]) if q is not None else 1.0
            if float(self._uniform()) * drawn < float(p[token]):
                return child
            if q is None:
                p[token] = 0
            else:
                p.copy_((p - q).clamp_min(0))
                q[token] = 0
                q.div_(q.sum().clamp_min(torch.finfo(q.dtype).tiny))
            total = p.sum()
            if not total > 0:
                # Rounding alone brings this about: q covered all of p, so that one of the children had to be kept.
                return child
            p.div_(total)
        return None

    def first(self, logits: torch.Tensor) -> int:
        """A token drawn from the law."""
        return self._draw(self.law(logits[None])[0])

    def _uniform(self) -> torch.Tensor:
        return torch.rand((), generator=self.generator, dtype=torch.float64)

    def _draw(self, p: torch.Tensor) -> int:
        return int(torch.multinomial(p, 1, generator=self.generator))


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (arXiv 2401.10774): keep x where p(x) > min(eps, delta exp(-H(p))). Lossy by design.

    The longest kept path wins, the likeliest of equally long ones; the next token is drawn from p behind it.
    """

    law: Law
    generator: torch.Generator = field(compare=False)
    eps: float = 0.09
    delta: float = 0.3
    lossless: ClassVar[bool] = False

    def __call__(self, tree: Tree, logits: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """The kept nodes and a token drawn behind them."""
        laws = self.law(logits)
        entropy = -(laws * laws.clamp_min(torch.finfo(laws.dtype).tiny).log()).sum(-1)
        bound: list[float] = (self.delta * torch.exp(-entropy)).clamp(max=self.eps).tolist()
        score = {0: 0.0}
        for node, parent in enumerate(tree.parent):
            if parent in score:
                mass = float(laws[parent, tree.token[node]])
                if mass > bound[parent]:
                    score[node] = score[parent] + math.log(mass)
        last = max(score, key=lambda node: (tree.depth[node], score[node]))
        return tree.path(last), int(torch.multinomial(laws[last], 1, generator=self.generator))

    def first(self, logits: torch.Tensor) -> int:
        """A token drawn from the law."""
        return int(torch.multinomial(self.law(logits[None])[0], 1, generator=self.generator))


def sampling_law(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Law:
    """The law of plain sampling in float64: softmax at a temperature, cut to `top_k` tokens, then to the mass `top_p`."""
    if not temperature > 0:
        raise ValueError("sampling needs a temperature above 0; Greedy is the law at 0")

    def law(logits: torch.Tensor) -> torch.Tensor:
        p, order = torch.softmax(logits.to(torch.float64) / temperature, dim=-1).sort(
            dim=-1, descending=True, stable=True
        )
        if top_k is not None:
            p[:, top_k:] = 0
        if top_p is not None:
            p = p / p.sum(-1, keepdim=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
        p = p / p.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter_(-1, order, p)

    return law
