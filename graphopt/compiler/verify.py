"""Verification on the spot: a pass is held to the effect that it states.

Everything is compared in float64, where the only difference between surgery and emulation is the order of sums, so that
the tolerance can be a small multiple of float64's own rounding.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.compiler.verify_sampled import SHAPES as SAMPLED_SHAPES
from graphopt.compiler.verify_sampled import sampled
from graphopt.diagnostics import Diagnostic, Place, VerifyError
from graphopt.ir.pictures import splices
from graphopt.ir.program import Input, Program
from graphopt.observe.stream import Limits
from graphopt.ops.trees import walk
from graphopt.passkit.edits import Plan, emulate_edits
from graphopt.passkit.facts import Effect
from graphopt.views import Views
from graphopt.views.trace import derives_from

SHAPES = ({"B": 1, "S": 1}, {"B": 2, "S": 7}, {"B": 3, "S": 33})


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Relative error allowed between two orders of the same sums of `terms` products: 128 eps sqrt(terms)."""
    return float(128 * torch.finfo(dtype).eps * terms**0.5)


def random_inputs(program: Program, sizes: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs at given sizes: tokens below the embedding's rows, padding with one padded row, positions from it.

    A program with a cache gets filled ones of unequal lengths and a random tree of new tokens; one that takes pictures a
    picture a row, whose placeholders make the rows longer than `sizes` says.
    """
    generator = torch.Generator().manual_seed(seed)
    text = sizes.get("S", 0)
    sizes = {**sizes, **with_pictures(program, sizes)}
    sizes = {**capacity_of(program, sizes), **sizes}
    vocabulary = vocabulary_of(program)
    made: dict[str, torch.Tensor] = {}
    shapes = {
        spec.name: [sizes.get(size, 2) if isinstance(size, str) else size for size in spec.shape]
        for spec in program.entry.inputs
    }
    for spec in program.entry.inputs:
        shape = shapes[spec.name]
        if spec.role == "tokens":
            made[spec.name] = _with_placeholders(
                program, spec, torch.randint(0, vocabulary, shape, generator=generator), text
            )
        elif spec.role == "padding":
            mask = torch.ones(shape, dtype=spec.dtype)
            real = min(text or shape[1], shape[1])
            if shape[0] > 1 and real > 2:
                mask[-1, : real // 3] = 0
            made[spec.name] = mask
        elif spec.role == "lengths":
            made[spec.name] = torch.randint(0, sizes["C"] - sizes["S"] + 1, shape, generator=generator)
        elif spec.role == "spans":
            parents = tuple(
                tuple(int(torch.randint(0, node, (), generator=generator)) if node else -1 for node in range(shape[2]))
                for _ in range(shape[0])
            )
            made[spec.name], depth = walk(parents)
        elif spec.role != "positions":
            made[spec.name] = (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                if spec.dtype.is_floating_point
                else torch.zeros(shape, dtype=spec.dtype)
            )
    roles = {spec.role: spec.name for spec in program.entry.inputs}
    if "positions" in roles:
        if "spans" in roles:
            made[roles["positions"]] = made[roles["lengths"]][:, None] + depth
        else:
            base = made[roles["padding"]] if "padding" in roles else torch.ones(shapes[roles["positions"]])
            made[roles["positions"]] = (base.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return made


def with_pictures(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes of a program that takes pictures: one a row, and room for what stands for them in the text."""
    places = sum(splice.entries for splice in splices(program))
    return {"I": sizes["B"], "S": sizes["S"] + places} if places else {}


def _with_placeholders(program: Program, spec: Input, ids: torch.Tensor, text: int) -> torch.Tensor:
    """Tokens with those of a picture in the middle of what is no padding in any row, and nowhere else."""
    for splice in splices(program):
        if splice.tokens.name == spec.name:
            ids = ids.masked_fill(ids == splice.token, (splice.token + 1) % max(2, splice.token))
            start = text // 3 + (text - text // 3) // 2
            ids[:, start : start + splice.entries] = splice.token
    return ids


def capacity_of(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    """A capacity for the caches of a program, when it has any: room for the tokens and a few committed entries."""
    if not program.cached:
        return {}
    # Without a prompt nothing leaves, so that caches behind a stage are as long as the others.
    behind = [dim.name for dim in program.dims if dim.name.startswith("C")]
    return {"P": 0, **dict.fromkeys(("C", *behind), sizes["S"] + 5)}


def vocabulary_of(program: Program) -> int:
    """Rows of the first embedding that tokens look up; 2 when there is none."""
    tokens = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and derives_from(node.args[1], tokens):
            return int(node.args[0].meta["val"].shape[0])
    return 2


def verify(
    before: Program,
    after: Program,
    plan: Plan,
    effect: Effect,
    level: str,
    where: Place | None,
    step: str,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """The certificate of a step; raises VerifyError, with the step's place, when the promise does not hold.

    `full` compares results in float64 at three shapes that were not captured; with `limits`, which are given where two
    copies of the model in float64 do not fit, some blocks of it (`verify_sampled`). `shapes` relies on shape propagation
    and graph checks, which every rewrite runs anyway; `off` says so.
    """
    if level == "off":
        return {"level": "off"}
    if level == "shapes" or before.weights.source is None:
        return {"level": "shapes", "checked": "shapes propagated, graph linted"}
    if effect == Effect.LOSSLESS_DECODE:
        from graphopt.compiler.verify_decode import verify_decode

        return verify_decode(before, after, where, step)
    views = Views(before)
    edits = () if effect == Effect.EXACT else plan.edits
    compared = "original" if effect == Effect.EXACT else "emulation"
    terms = max(max(weight.expr.shape, default=1) for weight in before.weights.weights.values())
    depth = max(1, len(views.blocks))
    allowed = tolerance(torch.float64, terms * depth)
    # A step may change how many places of a text a picture takes.
    given = after if after.entry.inputs == before.entry.inputs else before
    if limits is not None:
        tried = [random_inputs(given, sizes, seed) for seed, sizes in enumerate(SAMPLED_SHAPES)]

        def compare(i: int, name: str, got: torch.Tensor, expected: torch.Tensor) -> float:
            return _compare(name, got, expected, tried[i], before, allowed, SAMPLED_SHAPES[i], where, step, compared)

        return {
            "level": "sampled",
            "effect": str(effect),
            "reference": compared,
            "dtype": "float64",
            "shapes": [dict(sizes) for sizes in SAMPLED_SHAPES],
            "tolerance": allowed,
            **sampled(before, after, edits, tried, limits, compare),
        }
    reference = emulate_edits(before, views, edits) if effect != Effect.EXACT else before
    ours, theirs = after.module(torch.float64), reference.module(torch.float64)
    errors = []
    for seed, sizes in enumerate(SHAPES):
        inputs = random_inputs(given, sizes, seed)
        with torch.no_grad():
            for name, got, expected in zip(after.entry.outputs, ours(**inputs), theirs(**inputs), strict=True):
                errors.append(_compare(name, got, expected, inputs, before, allowed, sizes, where, step, compared))
    return {
        "level": "full",
        "effect": str(effect),
        "reference": compared,
        "dtype": "float64",
        "shapes": [dict(sizes) for sizes in SHAPES],
        "largest_relative_error": max(errors),
        "tolerance": allowed,
    }


def _compare(
    name: str,
    got: torch.Tensor,
    expected: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    program: Program,
    allowed: float,
    sizes: dict[str, int],
    where: Place | None,
    step: str,
    compared: str,
) -> float:
    if got.shape != expected.shape:
        raise VerifyError(
            Diagnostic("wrong_shape", f"{step} turned {name} {list(expected.shape)} into {list(got.shape)}", where)
        )
    padding = next((inputs[s.name] for s in program.entry.inputs if s.role == "padding"), None)
    if padding is not None and got.dim() >= 2 and got.shape[:2] == padding.shape:
        # Rows of padding attend to nothing: their values mean nothing and are not compared.
        got, expected = got[padding.bool()], expected[padding.bool()]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((got - expected).abs().max()) / max(scale, torch.finfo(torch.float64).tiny) if got.numel() else 0.0
    if not error <= allowed:
        raise VerifyError(
            Diagnostic(
                "promise_broken",
                f"{step} does not keep its promise: {name} differs from the {compared} by {error:.3g} (relative)",
                where,
                (f"at {', '.join(f'{k}={v}' for k, v in sizes.items())}, float64, allowed {allowed:.3g}",),
                ("this is a bug of the pass; please report it with the spec and the model's config",),
            )
        )
    return error
