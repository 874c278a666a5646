"""Verification of decoding: a program with a cache, fed piece by piece, gives what the stateless one gives at once.

Prompts of unequal lengths are prefilled together, then single tokens, several at a time and a tree of two branches
follow. Every result is compared in float64 with the stateless program's on the whole text, run row by row. Where tokens
leave, that program chooses them from the prompt, too. Pictures stand in the middle of each prompt.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.diagnostics import Diagnostic, Place, VerifyError
from graphopt.ir.leaving import PROMPT, losing, room, with_prompt
from graphopt.ir.pictures import splices
from graphopt.ir.program import Program
from graphopt.ops.trees import walk
from graphopt.runtime.cache import shortened, sizes_of
from graphopt.runtime.held import held_of

PROMPTS = ((1,), (4, 7), (20, 3, 33))
PIECES = (1, 1, 3)
BRANCH = 2
NOTHING = {torch.int64: -1, torch.uint8: 255}  # what buffers of whole numbers are filled with


class Session:
    """A program with a cache and what it holds, run in float64 without any shortcut of the runtime."""

    def __init__(
        self, program: Program, batch: int, capacity: int, context: dict[str, torch.Tensor], prompt: int
    ) -> None:
        sizes = {"B": batch, "P": prompt}
        sizes |= {str(s.shape[0]): batch for s in program.entry.inputs if s.role == "pictures"}
        self.rooms = rooms = room(program, capacity, sizes)
        self.losing = losing(program)
        self.run = program.module(torch.float64)
        self.names = {spec.role: spec.name for spec in program.entry.inputs}
        self.context = dict(context)
        self.buffers: dict[str, torch.Tensor] = {}
        for spec in program.entry.inputs:
            if spec.role == "cache":
                # What no row has written must not be read.
                kind, fill = (torch.float64, 1e3) if spec.dtype.is_floating_point else (spec.dtype, NOTHING[spec.dtype])
                self.buffers[spec.name] = torch.full(sizes_of(spec, batch, capacity, rooms), fill, dtype=kind)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        behind = [spec.name for spec in program.entry.inputs if spec.role == "entries"]
        self.entries = dict.fromkeys(behind, self.lengths)
        self.bounded, self.outputs = held_of(program), program.entry.outputs
        self.results: dict[str, torch.Tensor] = {}

    def __call__(
        self, tokens: torch.Tensor, parents: tuple[int, ...] | None = None, prompt: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Results `[B, S, ..]` of new tokens `[B, S]`; `parents` makes them a tree.

        They are the prompt where `prompt` `[B, S]` says which of them are real.
        """
        count = tokens.shape[1]
        spans, depth = walk((tuple(range(-1, count - 1)) if parents is None else parents,))
        given = {"tokens": tokens, "positions": self.lengths[:, None] + depth, "lengths": self.lengths, "spans": spans}
        given[PROMPT] = tokens[:, :0] if prompt is None else prompt
        with torch.no_grad():
            results = self.run(
                **{self.names[role]: value for role, value in given.items() if role in self.names},
                **self.entries,
                **self.buffers,
                **self.context,
            )
        self.results = dict(zip(self.outputs, results, strict=True))
        return results[0]

    def commit(self, counts: torch.Tensor) -> None:
        """Keep the first `counts` `[B]` entries of what the last call added."""
        steps = torch.arange(int(counts.max()))
        for held in self.bounded:
            path = torch.where(steps < counts[:, None], steps, -1)
            held.absorb(self.buffers, self.results, self.lengths, path)
        began = not bool(self.lengths.any())
        for stage, (name, held_there) in enumerate(self.entries.items(), 1):
            self.entries[name] = self.results[f"kept_{stage}"] if began else held_there + counts
        for name, (stays, _, dimension) in self.losing.items() if began else ():
            self.buffers[name] = shortened(self.buffers[name], self.results[stays], self.rooms[dimension])
        self.lengths = self.lengths + counts


def verify_decode(before: Program, after: Program, where: Place | None, step: str) -> dict[str, Any]:
    """The certificate of a step that promises the same decoding; raises VerifyError with the step's place."""
    from graphopt.compiler.verify import random_inputs, tolerance
    from graphopt.views import Views

    terms = max(max(weight.expr.shape, default=1) for weight in before.weights.weights.values())
    allowed = tolerance(torch.float64, terms * max(1, len(Views(before).blocks)))
    choosing = with_prompt(before)
    whole = choosing.module(torch.float64)
    tokens_name = next(spec.name for spec in before.entry.inputs if spec.role == "tokens")
    errors = [0.0]
    places = sum(splice.entries for splice in splices(before))
    for seed, plain in enumerate((*PROMPTS, *_beyond(before, after))):
        lengths = tuple(length + places for length in plain)
        batch, longest = len(lengths), max(lengths)
        extra = sum(PIECES) + 2 * BRANCH
        generator = torch.Generator().manual_seed(seed)
        text = _words(before, (batch, longest + extra), generator)
        for splice in splices(before):
            for row, length in enumerate(plain):
                text[row, length // 2 : length // 2 + splice.entries] = splice.token
        given = random_inputs(before, {"B": batch, "S": 1}, seed)
        own = {spec.name for spec in before.entry.inputs if spec.role in ("tokens", "padding", "positions")}
        context = {name: value for name, value in given.items() if name not in own}

        def expected(
            row: int,
            ids: torch.Tensor,
            context: dict[str, torch.Tensor] = context,
            lengths: tuple[int, ...] = lengths,
        ) -> torch.Tensor:
            alone = {name: value[row : row + 1] for name, value in context.items()}
            if choosing is not before:
                alone[PROMPT] = torch.ones(1, lengths[row], dtype=torch.int64)
            with torch.no_grad():
                result: torch.Tensor = whole(**{tokens_name: ids[None], **alone})[0][0]
            return result

        session = Session(after, batch, longest + extra + 3, context, longest)
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

        real = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(torch.int64)
        result = session(text[:, :longest], prompt=real)
        for row, length in enumerate(lengths):
            compare(result[row, :length], full[row][:length], "the prefill")
        session.commit(torch.tensor(lengths))
        for piece in PIECES:
            at = session.lengths[:, None] + torch.arange(piece)
            result = session(text.gather(1, at))
            for row, start in enumerate(session.lengths.tolist()):
                compare(result[row], full[row][start : start + piece], f"a step of {piece} tokens")
            session.commit(torch.full_like(session.lengths, piece))
        if any(held.heavy for held in session.bounded):
            # What stays is decided in the order of the text, so that a tree has no meaning.
            continue
        # Two branches of one root: root, first of each, second of each.
        parents = (-1, 0, 0, 1, 2)
        nodes = _words(before, (batch, len(parents)), generator)
        result = session(nodes, parents)
        for row, start in enumerate(session.lengths.tolist()):
            for path in ([0, 1, 3], [0, 2, 4]):
                wanted = expected(row, torch.cat([text[row, :start], nodes[row, path]]))[start:]
                compare(result[row, path], wanted, "a tree of tokens")
    return {
        "level": "full",
        "effect": "lossless-decode",
        "reference": "stateless run",
        "dtype": "float64",
        "prompts": [list(lengths) for lengths in (*PROMPTS, *_beyond(before, after))],
        "pieces": [*PIECES, *([] if any(held.heavy for held in held_of(after)) else ["tree"])],
        "largest_relative_error": max(errors),
        "tolerance": allowed,
    }


def _words(program: Program, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random tokens of which none stands for a picture."""
    from graphopt.compiler.verify import vocabulary_of

    ids = torch.randint(0, vocabulary_of(program), shape, generator=generator)
    for splice in splices(program):
        ids = ids.masked_fill(ids == splice.token, (splice.token + 1) % max(2, splice.token))
    return ids


def _beyond(before: Program, after: Program) -> tuple[tuple[int, ...], ...]:
    """Prompts on both sides of what bounded heads hold, so that entries go in prefill, while decoding, and not at all."""
    sizes = {spec.shape[2] for spec in after.entry.inputs if spec.name.endswith("_held_keys")}
    longest = next(dim.high for dim in before.dims if dim.name == "S") - sum(PIECES) - 2 * BRANCH
    largest = max((size for size in sizes if isinstance(size, int)), default=0)
    return ((largest + 7, max(1, largest - 2), 3),) if 0 < largest <= longest - 7 else ()
