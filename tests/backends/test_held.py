"""Kernels of bounded KV heads: over what they hold, over a whole text, and with weights that decide what stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphopt.backends import lower
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered
from graphopt.compiler.compile import compile
from graphopt.ir.program import Program
from graphopt.ops import bounded_attention, heavy_weights, held_attention
from graphopt.ops.trees import straight, walk
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec
from tests.backends.conftest import close
from tests.backends.test_attention import lowered_call
from tests.tiny import program

BATCH, KV, GROUP, SIZE, WIDTH = 2, 2, 3, 16, 24
# A chain, and beside its second token another one.
TREE = (-1, 0, 0, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Name: sink, recent, compensate, renumbered, sinks and soft cap.
POLICIES = {
    "streaming": (4, 9, False, True, False),
    "window": (0, 7, False, False, True),
    "razor": (2, 40, True, False, True),
}


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def held(policy: str, count: int, dtype: torch.dtype, size: int = SIZE) -> tuple[Any, ...]:
    """A step of `count` tokens behind rows that hold almost nothing, and more than they may."""
    sink, recent, compensate, renumbered, more = POLICIES[policy]
    slots = sink + recent + compensate
    floats = [
        drawn(BATCH, KV * GROUP, count, size), drawn(BATCH, KV, count, size), drawn(BATCH, KV, count, WIDTH),
        drawn(BATCH, KV, slots, size), drawn(BATCH, KV, slots, WIDTH), drawn(KV * GROUP),
        drawn(BATCH, KV * GROUP, count, size) * 0.9,
    ]  # fmt: skip
    q, k, v, keys, values, sinks, turned = (x.to(dtype) for x in floats)
    lengths = torch.tensor([1, 50])
    spans, depth = walk((TREE[:count],))
    positions = lengths[:, None] + depth
    return (q, k, v, keys, values, lengths, positions, spans, None, sinks if more else None, 0.3,
            20.0 if more else None, turned if renumbered else None, sink, recent, compensate)  # fmt: skip


def check(op: Any, arguments: tuple[Any, ...]) -> Lowered:
    """One call beside the op in float64."""
    made = lowered_call(op, *arguments)
    assert len(made.groups) == 1
    assert not made.library
    got = made([a for a in arguments if isinstance(a, torch.Tensor)])
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    assert close(got, op(*wide))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_bounded_heads_hold(policy: str, dtype: torch.dtype) -> None:
    for count in (1, 5):
        check(held_attention, held(policy, count, dtype))


def heavy(dtype: torch.dtype) -> tuple[Any, ...]:
    """A token behind heads of which one holds nothing yet."""
    q, k, keys = (drawn(BATCH, h, s, SIZE).to(dtype) for h, s in ((KV * GROUP, 1), (KV, 1), (KV, 37)))
    places = torch.arange(37).expand(BATCH, KV, -1).clone()
    places[0, 0] = -1
    places[1, 1, ::3] = -1
    mass, lengths = drawn(BATCH, KV, 37).abs().to(dtype), torch.tensor([3, 60])
    return q, k, keys, places, mass, lengths, straight(1), None, 0.3, None, 4, 5, 28


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heavy_hitters(dtype: torch.dtype) -> None:
    given = heavy(dtype)
    check(heavy_weights, given)
    check(heavy_weights, (*given[:7], drawn(KV * GROUP).to(dtype), 0.3, 5.0, *given[10:]))
    weights = heavy_weights(*given)
    rest = held("window", 1, dtype)
    values = drawn(BATCH, KV, 37, WIDTH).to(dtype)
    check(held_attention, (*rest[:3], given[2], values, *rest[5:8], weights, *rest[9:13], 4, 33, False))


@pytest.mark.parametrize("heads", [(0, 1), (1,), ()], ids=str)
def test_a_whole_text(heads: tuple[int, ...]) -> None:
    """Blocks are skipped where places are those of the text; padding makes them others."""
    for count, dtype, padded in ((150, torch.float32, False), (70, torch.bfloat16, True), (3, torch.float16, False)):
        q, k, v, turned = (
            drawn(BATCH, h, count, w).to(dtype) for h, w in ((6, SIZE), (2, SIZE), (2, WIDTH), (6, SIZE))
        )
        mask = torch.ones(BATCH, count, dtype=torch.bool) if padded else None
        if mask is not None:
            mask[1, 5 : count // 2] = False
        check(bounded_attention, (q, k, v, mask, drawn(6).to(dtype), 0.3, True, None, None, turned, None, list(heads),
                                  3, 20, 0, False))  # fmt: skip


def test_the_source_follows_the_policy() -> None:
    plain, compensated = (
        lowered_call(held_attention, *held(policy, 1, torch.bfloat16)).groups[0].kernel.source
        for policy in ("window", "razor")
    )
    assert "gone_key" in compensated
    assert "gone_key" not in plain
    assert "turned" in lowered_call(held_attention, *held("streaming", 1, torch.bfloat16)).groups[0].kernel.source


@pytest.mark.parametrize("target", TARGETS)
def test_steps_do_not_spill(target: str) -> None:
    calls = [(held_attention, held(policy, 1, torch.bfloat16, 128)) for policy in POLICIES]
    for op, arguments in [*calls, (heavy_weights, heavy(torch.bfloat16))]:
        for used in compile_ahead(lowered_call(op, *arguments).groups[0].kernel, target):
            assert used.spilled == 0, used


PROGRAMS: dict[str, dict[str, Any]] = {
    "duoattention": {"sink": 1, "recent": 5, "protect": {"kind": "heads", "heads": {0: (1,), 1: (0, 1)}}},
    "razorattention": {"sink": 1, "recent": 5, "compensate": True},
    "h2o": {"sink": 1, "recent": 3, "heavy": 4},
    "streaming": {"sink": 2, "recent": 4, "positions": "renumber"},
}


def step_inputs(source: Program, length: int) -> dict[str, torch.Tensor]:
    """One token behind `length` others, with random entries in the buffers."""
    given: dict[str, torch.Tensor] = {}
    sizes = {"B": 1, "S": 1, "C": 16, "C_8": 5}
    for spec in source.entry.inputs:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
        value = drawn(*shape).abs() if spec.dtype.is_floating_point else torch.zeros(shape, dtype=torch.int64)
        if spec.dtype == torch.uint8:
            value = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
        if spec.role in ("lengths", "positions"):
            value = torch.full(shape, length)
        elif spec.name.endswith("places"):
            value = torch.arange(shape[-1]).expand(shape).clone()
        given[spec.name] = value.to(spec.dtype) if spec.role != "spans" else straight(1)
    return given


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_with_bounded_heads(name: str) -> None:
    """Every attention of a step runs as kernels, over buffers that are as long as each head's own."""
    steps = [{"use": "bound_cache", **PROGRAMS[name]}, {"use": "insert_cache"}]
    text = json.dumps({"graphopt": 1, "steps": steps})
    source = compile(program("llama"), parse_spec(text, registry=PassRegistry()), verify="off")
    made = lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1})
    for length in (2, 11):
        given = step_inputs(source, length)
        wanted = source.module()(**{k: v.clone() for k, v in given.items()})
        for mine, true in zip(made(**given), wanted, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
    assert not [call for call in made.lowered.library if "attention" in call or "heavy" in call]
