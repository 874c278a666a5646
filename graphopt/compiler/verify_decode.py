"""Verification of decoding: a program with a cache, fed piece by piece, gives what the stateless one gives at once.

Prompts of unequal lengths are prefilled together, then single tokens, several at a time and a tree of two branches
follow. Every result is compared in float64 with the stateless program's on the whole text, run row by row.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.diagnostics import Diagnostic, Place, VerifyError
from graphopt.ir.program import Program

PROMPTS = ((1,), (4, 7), (20, 3, 33))
PIECES = (1, 1, 3)
BRANCH = 2


class Session:
    """A program with a cache and what it holds, run in float64 without any shortcut of the runtime."""

    def __init__(self, program: Program, batch: int, capacity: int, context: dict[str, torch.Tensor]) -> None:
        self.run = program.module(torch.float64)
        self.names = {spec.role: spec.name for spec in program.entry.inputs}
        self.held = dict(context)
        for spec in program.entry.inputs:
            if spec.role == "cache":
                heads, size = (s for s in spec.shape if isinstance(s, int))
                # What no row has written must not be read.
                self.held[spec.name] = torch.full((batch, heads, capacity, size), 1e3, dtype=torch.float64)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, tokens: torch.Tensor, ancestors: torch.Tensor | None = None) -> torch.Tensor:
        """Results `[B, S, ..]` of new tokens `[B, S]`; `ancestors` `[1, S, S]` makes them a tree."""
        count = tokens.shape[1]
        if ancestors is None:
            ancestors = torch.ones(1, count, count, dtype=torch.bool).tril()
        positions = self.lengths[:, None] + (ancestors.sum(-1) - 1)
        given = {"tokens": tokens, "positions": positions, "lengths": self.lengths, "ancestors": ancestors}
        with torch.no_grad():
            result: torch.Tensor = self.run(**{self.names[role]: value for role, value in given.items()}, **self.held)[
                0
            ]
        return result


def verify_decode(before: Program, after: Program, where: Place | None, step: str) -> dict[str, Any]:
    """The certificate of a step that promises the same decoding; raises VerifyError with the step's place."""
    from graphopt.compiler.verify import random_inputs, tolerance, vocabulary_of
    from graphopt.views import Views

    terms = max(max(weight.expr.shape, default=1) for weight in before.weights.weights.values())
    allowed = tolerance(torch.float64, terms * max(1, len(Views(before).blocks)))
    whole = before.module(torch.float64)
    tokens_name = next(spec.name for spec in before.entry.inputs if spec.role == "tokens")
    errors = [0.0]
    for seed, lengths in enumerate(PROMPTS):
        batch, longest = len(lengths), max(lengths)
        extra = sum(PIECES) + 2 * BRANCH
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocabulary_of(before), (batch, longest + extra), generator=generator)
        given = random_inputs(before, {"B": batch, "S": 1}, seed)
        own = {spec.name for spec in before.entry.inputs if spec.role in ("tokens", "padding", "positions")}
        context = {name: value for name, value in given.items() if name not in own}

        def expected(row: int, ids: torch.Tensor, context: dict[str, torch.Tensor] = context) -> torch.Tensor:
            alone = {name: value[row : row + 1] for name, value in context.items()}
            with torch.no_grad():
                result: torch.Tensor = whole(**{tokens_name: ids[None], **alone})[0][0]
            return result

        session = Session(after, batch, longest + extra + 3, context)
        full = [expected(row, text[row]) for row in range(batch)]

        def compare(got: torch.Tensor, wanted: torch.Tensor, what: str, lengths: tuple[int, ...] = lengths) -> None:
            if got.shape != wanted.shape:
                raise VerifyError(
                    Diagnostic("wrong_shape", f"{step}: {list(got.shape)} for {list(wanted.shape)}", where)
                )
            scale = max(float(wanted.abs().max()), torch.finfo(torch.float64).tiny)
            error = float((got - wanted).abs().max()) / scale
            errors.append(error)
            if not error <= allowed:
                raise VerifyError(
                    Diagnostic(
                        "promise_broken",
                        f"{step} does not keep its promise: {what} differs from the stateless run by {error:.3g}",
                        where,
                        (f"prompts of {', '.join(map(str, lengths))} tokens, float64, allowed {allowed:.3g}",),
                        ("this is a bug of the pass; please report it with the spec and the model's config",),
                    )
                )

        result = session(text[:, :longest])
        for row, length in enumerate(lengths):
            compare(result[row, :length], full[row][:length], "the prefill")
        session.lengths = torch.tensor(lengths)
        for piece in PIECES:
            at = session.lengths[:, None] + torch.arange(piece)
            result = session(text.gather(1, at))
            for row, start in enumerate(session.lengths.tolist()):
                compare(result[row], full[row][start : start + piece], f"a step of {piece} tokens")
            session.lengths = session.lengths + piece
        # Two branches of one root: root, first of each, second of each.
        parents = (-1, 0, 0, 1, 2)
        ancestors = torch.eye(len(parents), dtype=torch.bool)
        for node, parent in enumerate(parents[1:], 1):
            ancestors[node] |= ancestors[parent]
        nodes = torch.randint(0, vocabulary_of(before), (batch, len(parents)), generator=generator)
        result = session(nodes, ancestors[None])
        for row, start in enumerate(session.lengths.tolist()):
            for path in ([0, 1, 3], [0, 2, 4]):
                wanted = expected(row, torch.cat([text[row, :start], nodes[row, path]]))[start:]
                compare(result[row, path], wanted, "a tree of tokens")
    return {
        "level": "full",
        "effect": "lossless-decode",
        "reference": "stateless run",
        "dtype": "float64",
        "prompts": [list(lengths) for lengths in PROMPTS],
        "pieces": [*PIECES, "tree"],
        "largest_relative_error": max(errors),
        "tolerance": allowed,
    }
