"""From what a spec says about drafting to a speculator."""

from __future__ import annotations

import json
from typing import assert_never

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.extract import extract
from graphopt.ir.program import Program
from graphopt.passkit.drafting import (
    CopyDrafter,
    Drafting,
    ExitDrafter,
    HeadsDrafter,
    RecycleDrafter,
    SampledDrafter,
    SkipDrafter,
)
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate.accept import Acceptance, Exact, Greedy, Typical, sampling_law
from graphopt.runtime.speculate.control import Fixed, Goodput
from graphopt.runtime.speculate.copying import Copy
from graphopt.runtime.speculate.decode import Speculator
from graphopt.runtime.speculate.drafter import Drafter
from graphopt.runtime.speculate.heads import Heads, split
from graphopt.runtime.speculate.network import Chain, Sampled
from graphopt.runtime.speculate.recycling import Recycle
from graphopt.runtime.speculate.skipping import Skipping, without
from graphopt.runtime.with_cache import with_cache


def drafting_of(program: Program) -> Drafting | None:
    """How a program decodes, by the last step of its trail that says so."""
    for applied in reversed(program.trail):
        for edit in applied.edits:
            if edit.get("edit") == "speculation":
                return Drafting.model_validate_json(json.dumps({k: v for k, v in edit.items() if k != "edit"}))
    return None


def speculator(
    program: Program,
    drafting: Drafting,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Speculator:
    """A program, given a cache if it has none, and the drafter of a spec, ready to decode.

    Raises PlanError when the program cannot have a cache, or lacks what the drafter reads.
    """
    heads: tuple[Program, ...] = ()
    if isinstance(drafting.drafter, HeadsDrafter):
        program, heads = split(program)
    cached, reason = with_cache(program)
    if reason is not None:
        raise PlanError.of("no_cache", f"speculation needs a cache, and the program cannot have one: {reason}")
    generator = torch.Generator().manual_seed(seed)
    drafter = _drafter(cached, drafting, heads, dtype, temperature, top_k, top_p, generator)
    if isinstance(drafting.drafter, ExitDrafter):
        # Verifying needs no exit: drafting runs it, on tokens that it has not read yet.
        cached = extract(cached, [name for name in cached.entry.outputs if name != "exit"])
    accept: Acceptance = Greedy()
    if temperature > 0:
        law = sampling_law(temperature, top_k, top_p)
        accept = Exact(law, generator) if drafting.accept == "exact" else Typical(law, generator)
    controller = Goodput(drafting.rows) if drafting.adapt else Fixed(max(drafting.rows))
    return Speculator(Decoder(cached, dtype), drafter, controller, accept)


def _drafter(
    program: Program,
    drafting: Drafting,
    heads: tuple[Program, ...],
    dtype: torch.dtype,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Drafter:
    asked = drafting.drafter
    match asked:
        case CopyDrafter():
            beside = _recycle(asked.fallback, drafting.rows) if asked.fallback is not None else None
            return Copy(asked.match, asked.length, asked.occurrence, beside)
        case RecycleDrafter():
            return _recycle(asked, drafting.rows)
        case SkipDrafter():
            options = {name: getattr(asked, name) for name in type(asked).model_fields if name != "kind"}
            return Skipping(program, dtype, seed=generator.initial_seed(), **options)
        case ExitDrafter():
            return Chain(Decoder(extract(program, ["exit"]), dtype), part=True, length=asked.length, stop=asked.stop)
        case HeadsDrafter():
            return Heads(heads, dtype, ranks=asked.ranks, width=asked.width)
        case SampledDrafter():
            # Greedy decoding accepts the likeliest tokens alone, whatever they were drawn from.
            law = sampling_law(temperature, top_k, top_p) if temperature > 0 else sampling_law(1.0)
            return Sampled(
                Decoder(without(program, asked.skip), dtype),
                law,
                generator,
                part=True,
                branching=asked.branching,
                mode=asked.mode,
            )
    assert_never(asked)


def _recycle(asked: RecycleDrafter, rows: tuple[int, ...]) -> Recycle:
    return Recycle(asked.ranks, asked.remember, budgets=rows)
