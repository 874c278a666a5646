"""Drafting by copying what followed the same words before: CopySpec (arXiv 2502.08923)."""

from __future__ import annotations

from typing import Literal

from graphopt.runtime.speculate.drafter import Drafter, Rows
from graphopt.runtime.speculate.tree import Tree


class Copy:
    """Proposes what followed the last `match` tokens where they occurred `first` or `last` in the sequence.

    The copy has at most `length` tokens, and goes on through itself when it reaches the end of the sequence, so that a
    loop is copied whole. Where nothing matches, `fallback` drafts; without one the step decodes plainly.
    """

    def __init__(
        self,
        match: int = 3,
        length: int = 10,
        occurrence: Literal["first", "last"] = "first",
        fallback: Drafter | None = None,
    ) -> None:
        if match < 1 or length < 1:
            raise ValueError(f"a copy needs at least one token to match and one to copy, not {match} and {length}")
        self.match, self.length, self.occurrence, self.fallback = match, length, occurrence, fallback
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}

    @property
    def reads(self) -> int:
        """What the fallback reads."""
        return 0 if self.fallback is None else self.fallback.reads

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Index the prompt."""
        self.tokens, self.ends = [], {}
        self._extend(prompt)
        if self.fallback is not None:
            self.fallback.begin(prompt, rows)

    def propose(self, root: int, budget: int) -> Tree:
        """A chain of at most `budget` nodes, or what the fallback proposes."""
        text = [*self.tokens[-self.match :], root]
        place = self.ends.get(tuple(text[-self.match :])) if len(text) >= self.match else None
        if place is None:
            return self.fallback.propose(root, budget) if self.fallback is not None else Tree.root(root)
        copied: list[int] = []
        end = len(self.tokens)
        for at in range(place, place + min(self.length, budget - 1)):
            copied.append(self.tokens[at] if at < end else root if at == end else copied[at - end - 1])
        return Tree.chain(root, copied)

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Index the tokens that were kept."""
        self._extend(tuple(rows.token[node] for node in path))
        if self.fallback is not None:
            self.fallback.observe(rows, path)

    def truncate(self, length: int) -> None:
        """Index the first `length` tokens anew."""
        kept, self.tokens, self.ends = tuple(self.tokens[:length]), [], {}
        self._extend(kept)
        if self.fallback is not None:
            self.fallback.truncate(length)

    def _extend(self, tokens: tuple[int, ...]) -> None:
        for token in tokens:
            self.tokens.append(token)
            gram = tuple(self.tokens[-self.match :])
            if len(gram) == self.match and (self.occurrence == "last" or gram not in self.ends):
                self.ends[gram] = len(self.tokens)
