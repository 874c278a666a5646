"""Verification of speculative decoding: with a drafter a program says, greedily, exactly what it says without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from graphopt.diagnostics import Diagnostic, Place, VerifyError
from graphopt.ir.program import Program
from graphopt.passkit.drafting import Drafting
from graphopt.runtime.speculate import Fixed, Speculator
from graphopt.runtime.speculate.setup import speculator

PROMPTS, NEW = (1, 9, 40), 32


def verify_drafting(program: Program, drafting: Drafting, where: Place | None, step: str) -> dict[str, Any]:
    """What was compared: tokens of random prompts in float64, for each number of rows that a step may have.

    Raises VerifyError, with the step's place, at the first other token.
    """
    from graphopt.compiler.verify import vocabulary_of

    drafted = speculator(program, drafting, dtype=torch.float64)
    plain = Speculator(drafted.decoder)
    generator = torch.Generator().manual_seed(0)
    steps = emitted = 0
    for length in PROMPTS:
        prompt = torch.randint(0, vocabulary_of(program), (length,), generator=generator)
        wanted, _ = plain.generate(prompt, NEW)
        for rows in drafting.rows:
            got, log = replace(drafted, controller=Fixed(rows)).generate(prompt, NEW)
            if not torch.equal(got, wanted):
                first = int((got != wanted).nonzero()[0])
                raise VerifyError(
                    Diagnostic(
                        "promise_broken",
                        f"{step} does not keep its promise: with drafts of {rows} rows token {first} is {int(got[first])}, "
                        f"not {int(wanted[first])}",
                        where,
                        (f"behind a random prompt of {length} tokens, greedily, float64",),
                        ("this is a bug of the drafter; please report it with the spec and the model's config",),
                    )
                )
            steps, emitted = steps + len(log.steps), emitted + log.emitted - 1
    return {
        "greedy": "equal",
        "prompts": len(PROMPTS),
        "rows": list(drafting.rows),
        "tokens": emitted,
        "tokens_a_step_on_random_text": round(emitted / steps, 3),
        "sampled": "the law of plain sampling" if drafting.accept == "exact" else "lossy: typical acceptance",
    }
