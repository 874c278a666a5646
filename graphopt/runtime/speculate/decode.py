"""The speculative loop: propose, verify in one run, accept, commit, tell."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from graphopt.diagnostics import PlanError
from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate.accept import Acceptance, Greedy
from graphopt.runtime.speculate.control import Controller, Fixed
from graphopt.runtime.speculate.drafter import Drafter, Rows
from graphopt.runtime.speculate.log import Event, Log
from graphopt.runtime.speculate.network import Network
from graphopt.runtime.speculate.tree import Tree

_TOGETHER = 64
"""Plain steps of which drafter and controller hear at once, at most: their seconds are to follow the machine's."""


@dataclass
class Speculator:
    """Decodes one sequence at a time with a drafter; without one, or with a budget of one row, it decodes plainly.

    The program alone writes its cache, which ends with every emitted token but the last.
    """

    decoder: Decoder
    drafter: Drafter | None = None
    controller: Controller = field(default_factory=lambda: Fixed(16))
    accept: Acceptance = field(default_factory=Greedy)
    clock: Callable[[], float] = time.perf_counter
    """what events are timed by, in seconds"""

    def generate(
        self,
        prompt: torch.Tensor,
        max_new_tokens: int,
        eos: int | Iterable[int] | None = None,
        stream: Callable[[int], object] | None = None,
        **context: torch.Tensor,
    ) -> tuple[torch.Tensor, Log]:
        """Continue a prompt `[S]` by at most `max_new_tokens`, up to the first `eos`; the whole sequence and its log.

        `stream` sees every token as it is decided. `context` are the program's other inputs, such as the pictures of the
        prompt. Raises PlanError for anything but one prompt with tokens, and for pictures before a drafter that reads
        the text with a program of its own.
        """
        if prompt.dim() != 1 or not len(prompt):
            raise PlanError.of("no_prompt", f"speculation continues one prompt [S], not {list(prompt.shape)}")
        stops = {eos} if isinstance(eos, int) else set(eos or ())
        sequence, log, tell = prompt.tolist(), Log(), stream or (lambda token: None)
        if max_new_tokens < 1:
            return prompt, log
        if context and isinstance(self.drafter, Network):
            raise PlanError.of(
                "drafter_blind",
                f"{', '.join(context)}: a drafter that is a program reads the tokens alone",
                help=("draft by copying, recycling or heads, or decode without drafts",),
            )
        # No more room than plain decoding has: caches of one size lie in the same places, and are read as fast.
        cache = self.decoder.cache(1, len(prompt) + max_new_tokens, prompt=len(prompt), **context)
        with torch.inference_mode():
            sequence.append(self._begin(cache, tuple(sequence), log))
            tell(sequence[-1])
            left = max_new_tokens - 1
            while left and sequence[-1] not in stops:
                pause = left if self.drafter is None else self.controller.pause()
                budget = 1 if pause else min(self.controller.budget(), left)
                if budget == 1:
                    new = self._plain(cache, sequence[-1], max(pause, 1), left, stops, log, stream)
                else:
                    new = self._step(cache, sequence[-1], budget, left, stops, log)
                    for token in new:
                        tell(token)
                sequence += new
                left -= len(new)
        return torch.tensor(sequence, dtype=torch.long), log

    def _begin(self, cache: Cache, prompt: tuple[int, ...], log: Log) -> int:
        """Read the prompt; the first token behind it."""
        started = self.clock()
        rows = self._run(cache, Tree.chain(prompt[0], prompt[1:]))
        cache.commit(len(prompt))
        if self.drafter is not None:
            self.drafter.begin(prompt, rows)
        token = self.accept.first(rows.logits[-1])
        log.events.append(Event(len(prompt), 1, 0, self.clock() - started))
        return token

    def _step(self, cache: Cache, root: int, budget: int, most: int, stops: set[int], log: Log) -> list[int]:
        """Draft behind the root, verify, keep a path: the tokens that this emits, at least one and at most `most`."""
        assert self.drafter is not None
        started = self.clock()
        tree = self.drafter.propose(root, budget)
        drafted = self.clock()
        rows = self._run(cache, tree)
        path, token = self.accept(tree, rows.logits)
        new = _until_stop([*(tree.token[node] for node in path[1:]), token][:most], stops)
        path = path[: len(new)]
        cache.commit(len(path) if path == tuple(range(len(path))) else torch.tensor([path]))
        self.drafter.observe(rows, path)
        event = Event(len(tree), len(new), len(path) - 1, self.clock() - started, drafted - started)
        log.events.append(event)
        self.controller.told(event)
        return new

    def _plain(
        self,
        cache: Cache,
        root: int,
        pause: int,
        left: int,
        stops: set[int],
        log: Log,
        stream: Callable[[int], object] | None,
    ) -> list[int]:
        """Tokens without drafts: what plain decoding does, and no more, so that it costs no more."""
        started, apart = self.clock(), 0.0
        new, ids = list[int](), torch.tensor([[root]])
        most, reads = min(pause, left, _TOGETHER), 0 if self.drafter is None else self.drafter.reads
        # Results that no draft will follow soon are let go at once, so that the next ones take their memory.
        runs = deque[tuple[torch.Tensor, ...]](maxlen=max(min(reads, 1), reads - (pause - most)))
        while True:
            values = self.decoder.step(cache, ids)
            token = self.accept.first(values[0].view(-1))
            cache.commit(1)
            new.append(token)
            runs.append(values)
            if stream is not None:
                before = self.clock()
                stream(token)
                apart += self.clock() - before
            if len(new) == most or token in stops:
                break
            ids.fill_(token)
        if self.drafter is not None:
            rows = Rows.one_by_one((root, *new[:-1]), tuple(runs), self.decoder.program.entry.outputs, cache)
            self.drafter.observe(rows, tuple(range(len(new))))
        event = Event(1, 1, 0, (self.clock() - started - apart) / len(new))
        log.events += [event] * len(new)
        self.controller.told(event, len(new))
        return new

    def _run(self, cache: Cache, tree: Tree) -> Rows:
        """Results of the program for the nodes of a tree behind what the cache holds."""
        ids = torch.tensor([tree.token])
        values = self.decoder.step(cache, ids, parents=None if tree.is_chain else [tree.parent])
        return Rows(tree.token, tree.parent, values, self.decoder.program.entry.outputs, cache)


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop, it included."""
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[: place + 1]
    return tokens
