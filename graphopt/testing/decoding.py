"""What decoding with a cache must give: the stateless run's results, and as many entries as there are tokens."""

from __future__ import annotations

import torch

from graphopt.compiler import verify
from graphopt.ir.extract import extract
from graphopt.ir.leaving import OF_PROMPT, PROMPT, with_prompt
from graphopt.ir.pictures import splices
from graphopt.ir.program import Program
from graphopt.passes.cache.insert_cache import InsertCache
from graphopt.passkit import Context
from graphopt.passkit.edits import apply_edits
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.held import held_of
from graphopt.testing.trial import LawBroken
from graphopt.views import Views

LAW = "generation_is_kept"
PROMPTS = (3, 1)
STEPS = 3


def is_cached(program: Program) -> bool:
    """Whether a program takes lengths, as one with a cache does."""
    return any(spec.role == "lengths" for spec in program.entry.inputs)


def with_cache(program: Program) -> Program | None:
    """The program with a cache; None when it cannot have one, each attention (or the model) with its reason."""
    views = Views(program)
    plan = InsertCache().plan(Context(views, tuple(range(len(views.blocks)))))
    if plan.edits:
        return apply_edits(program, views, plan.edits, InsertCache.name)
    if not plan.declines or not all(decline.reason.strip() for decline in plan.declines):
        raise LawBroken(LAW, "insert_cache neither caches nor says why not")
    return None


def compare(cached: Program, plain: Program, bound: float) -> None:
    """Greedy decoding of two prompts of unequal length, float64: each step's logits, tokens and the cache's lengths.

    Raises LawBroken at the first difference of more than `bound`, relative to the largest logit.
    """
    batch, longest = len(PROMPTS), max(PROMPTS)
    drawn = verify.random_inputs(plain, {"B": batch, "S": longest, "T": 4}, 0)
    roles = {spec.name: spec.role for spec in plain.entry.inputs}
    name = next(key for key in drawn if roles[key] == "tokens")
    # Prompts are shorter than what stands for a picture.
    for splice in splices(plain):
        drawn[name] = drawn[name].masked_fill(drawn[name] == splice.token, (splice.token + 1) % max(2, splice.token))
    drawn[name] = drawn[name][:, :longest]
    context = {key: value for key, value in drawn.items() if roles[key] == "values"}
    # Draft heads that read the tokens to come are the drafter's affair: it runs them by themselves. What bounded heads
    # take in is the cache's.
    first, *rest = cached.entry.outputs
    taken = tuple(f"{stem}_new_" for held in held_of(cached) for stem in held.stems)
    taken = (*taken, *OF_PROMPT)
    decoder = Decoder(extract(cached, [first, *(name for name in rest if name.startswith(taken))]), torch.float64)
    choosing = with_prompt(plain)
    whole = choosing.module(torch.float64)
    cache = decoder.cache(batch, longest + STEPS, prompt=longest, **context)
    rows = [drawn[name][row, :length] for row, length in enumerate(PROMPTS)]
    with torch.no_grad():
        real = (torch.arange(longest) < torch.tensor(PROMPTS)[:, None]).to(torch.int64)
        logits = decoder.step(cache, drawn[name], prompt=real)[0]
        cache.commit(torch.tensor(PROMPTS))
        last = [logits[row, length - 1] for row, length in enumerate(PROMPTS)]
        for step in range(STEPS + 1):
            for row, text in enumerate(rows):
                alone = {key: value[row : row + 1] for key, value in context.items()}
                if choosing is not plain:
                    alone[PROMPT] = torch.ones(1, PROMPTS[row], dtype=torch.int64)
                _close(last[row], whole(**{name: text[None]}, **alone)[0][0, -1], bound, step)
                if int(cache.lengths[row]) != len(text):
                    raise LawBroken(LAW, f"the cache holds {int(cache.lengths[row])} entries of {len(text)} tokens")
            if step == STEPS:
                break
            tokens = torch.stack([logit.argmax() for logit in last])
            rows = [torch.cat([text, token[None]]) for text, token in zip(rows, tokens, strict=True)]
            logits = decoder.step(cache, tokens[:, None])[0]
            cache.commit(1)
            last = list(logits[:, -1])


def _close(got: torch.Tensor, expected: torch.Tensor, bound: float, step: int) -> None:
    if got.shape != expected.shape:
        raise LawBroken(LAW, f"{list(got.shape)} instead of {list(expected.shape)} at step {step}")
    scale = max(float(expected.abs().max()), torch.finfo(torch.float64).tiny)
    error = float((got - expected).abs().max()) / scale
    if not error <= bound:
        raise LawBroken(LAW, f"with a cache it is off by {error:.3g} at step {step}, {bound:.3g} is allowed")
