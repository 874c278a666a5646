"""What the tests of speculation share: cached tiny programs and a drafter that is right as often as wanted."""

from __future__ import annotations

from functools import cache

import torch

from graphopt.ir.program import Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import apply_edits
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate import Rows, Tree
from graphopt.views import Views
from tests.tiny import program


def insert_cache(of: Program) -> Program:
    """The program with a cache."""
    views = Views(of)
    config = PassRegistry().get("insert_cache")()
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    return apply_edits(of, views, plan.edits, "insert_cache")


@cache
def decoder(name: str) -> Decoder:
    """A tiny model, ready to decode in float64, where two orders of the same sums choose the same tokens."""
    return Decoder(insert_cache(program(name)), torch.float64)


class Guesser:
    """Proposes random trees; one path of each follows the true continuation for a random number of tokens."""

    def __init__(self, truth: list[int], vocabulary: int = 96, seed: int = 0) -> None:
        self.truth, self.vocabulary = truth, vocabulary
        self.generator = torch.Generator().manual_seed(seed)
        self.length = 0
        self.seen: list[tuple[Rows, tuple[int, ...]]] = []

    @property
    def reads(self) -> int:
        """All results."""
        return 1000

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Remember where the sequence stands."""
        assert rows.token == prompt
        self.length = len(prompt)

    def propose(self, root: int, budget: int) -> Tree:
        """A random tree that holds a piece of the truth."""
        token, parent, taken = [root], [-1], set()
        right = int(torch.randint(0, budget, (), generator=self.generator))
        last = 0
        for word in self.truth[self.length + 1 : self.length + 1 + right]:
            taken.add((last, word))
            token.append(word)
            parent.append(last)
            last = len(token) - 1
        while len(token) < budget:
            above = int(torch.randint(0, len(token), (), generator=self.generator))
            word = int(torch.randint(0, self.vocabulary, (), generator=self.generator))
            if (above, word) not in taken:
                taken.add((above, word))
                token.append(word)
                parent.append(above)
        return Tree(tuple(token), tuple(parent))

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Count what was kept."""
        self.length += len(path)
        self.seen.append((rows, path))

    def truncate(self, length: int) -> None:
        """Go back."""
        self.length = length
