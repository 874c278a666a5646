"""Kernels over a quantised cache: unpacked in the loads, in steps of one token and of a tree."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphopt.backends import lower
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.compiler.compile import compile
from graphopt.ops import packed_attention
from graphopt.ops.packed import pack_keys, pack_values
from graphopt.ops.trees import straight, walk
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec
from tests.backends.test_attention import lowered_call
from tests.backends.test_held import TREE, check, drawn, step_inputs
from tests.tiny import program

BATCH, KV, GROUP, SIZE, WIDTH = 2, 2, 3, 16, 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Name: bits, group, recent, sinks and soft cap.
GRIDS = {"2 bits": (2, 16, 9, False), "4 bits": (4, 8, 8, True), "8 bits": (8, 40, 70, False)}


def step(grid: str, count: int, dtype: torch.dtype, size: int = SIZE, width: int = WIDTH) -> tuple[Any, ...]:
    """A step of `count` tokens behind rows without a packed block and with several, some of which are half read."""
    bits, group, recent, more = GRIDS[grid]
    blocks = 200 // group
    floats = [
        drawn(BATCH, KV * GROUP, count, size), drawn(BATCH, KV, count, size), drawn(BATCH, KV, count, width),
        drawn(BATCH, KV, recent + group, size), drawn(BATCH, KV, recent + group, width), drawn(KV * GROUP),
        drawn(BATCH, KV, blocks * group, size), drawn(BATCH, KV, blocks * group, width),
    ]  # fmt: skip
    q, k, v, keys, values, sinks, old_keys, old_values = (x.to(dtype) for x in floats)
    lengths = torch.tensor([1, 4 * group + recent - 2])
    spans, depth = walk((TREE[:count],)) if count <= len(TREE) else (straight(count), torch.arange(count)[None])
    positions = lengths[:, None] + depth
    packed = *pack_keys(old_keys, bits, group), *pack_values(old_values, bits, group)
    return (q, k, v, keys, values, lengths, positions, spans, *packed, sinks if more else None, 0.3,
            20.0 if more else None, bits, group, recent)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_steps(grid: str, dtype: torch.dtype) -> None:
    for count in (1, 5):
        made = check(packed_attention, step(grid, count, dtype))
        assert made.groups[0].kernel.template == "packed_attention"


def test_a_step_with_which_new_tokens_become_old_is_a_library_call() -> None:
    given = step("4 bits", 9, torch.float32)
    assert not lowered_call(packed_attention, *given).groups


@pytest.mark.parametrize("target", TARGETS)
def test_steps_do_not_spill(target: str) -> None:
    for grid in ("2 bits", "4 bits", "8 bits"):
        made = lowered_call(packed_attention, *step(grid, 1, torch.bfloat16, 128, 128))
        for used in compile_ahead(made.groups[0].kernel, target):
            assert used.spilled == 0, (grid, used)


def test_a_program_with_a_quantised_cache() -> None:
    steps = [{"use": "quantize_cache", "bits": 2, "group": 8, "recent": 8}, {"use": "insert_cache"}]
    text = json.dumps({"graphopt": 1, "steps": steps})
    source = compile(program("llama"), parse_spec(text, registry=PassRegistry()), verify="off")
    made = lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1})
    for length in (2, 27):
        given = step_inputs(source, length)
        wanted = source.module()(**{k: v.clone() for k, v in given.items()})
        for mine, true in zip(made(**given), wanted, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4)
    assert not [call for call in made.lowered.library if "attention" in call]
