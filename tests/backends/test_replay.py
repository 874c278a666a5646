"""Replaying a step: what is copied, what stays, and when launches cannot be repeated. A GPU is not needed for that."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphopt.backends import lower
from graphopt.backends.replay import Replay
from graphopt.compiler.compile import compile
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.runtime.cache import Cache
from graphopt.spec import parse_spec
from tests.tiny import program, tokens

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Outputs = tuple[Any, ...]


class Recorder:
    """Records as a device does: the same tensors are read and written at every replay."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            for mine, new in zip(outputs, run(), strict=True):
                mine.copy_(new)

        return replay, outputs


def accumulate(weight: torch.Tensor, state: torch.Tensor, x: torch.Tensor) -> Outputs:
    state[0] = x.sum()
    return (weight * x,)


def test_held_arguments_stay_and_others_are_copied() -> None:
    recorder = Recorder()
    step = Replay(accumulate, [True, True, False], recorder)
    weight, state = torch.arange(3.0), torch.zeros(2)
    first = step(weight, state, torch.ones(3))[0]
    second = step(weight, state, torch.full((3,), 2.0))[0]
    assert first.tolist() == [0, 1, 2], "results are the caller's own"
    assert second.tolist() == [0, 2, 4]
    assert state[0] == 6
    weight.mul_(10)
    assert step(weight, state, torch.ones(3))[0].tolist() == [0, 10, 20], "what is held is read where it lies"
    assert recorder.recorded == 1


def test_other_addresses_and_shapes_are_recorded_anew() -> None:
    recorder = Recorder()
    step = Replay(accumulate, [True, True, False], recorder, most=2)
    states = [torch.zeros(2) for _ in range(3)]
    for state in (*states, states[2]):
        step(torch.ones(3) if state is None else WEIGHT, state, torch.ones(3))
    assert recorder.recorded == 3
    assert all(state[0] == 3 for state in states)
    step(WEIGHT, states[0], torch.ones(3))
    assert recorder.recorded == 4, "only the last two are kept"
    step(WEIGHT, states[0], torch.ones(1))
    assert recorder.recorded == 5
    with pytest.raises(ValueError, match="3 arguments"):
        step(WEIGHT)


WEIGHT = torch.ones(3)


def cached(name: str = "llama") -> Program:
    text = json.dumps({"graphopt": 1, "steps": [{"use": "insert_cache"}]})
    return compile(program(name), parse_spec(text, registry=PassRegistry()), verify="off")


def decode(step: Callable[..., Outputs], source: Program, device: str, count: int) -> list[torch.Tensor]:
    """Logits of `count` tokens, one at a time."""
    cache = Cache(source, 1, 16, torch.float32, device)
    ids, found = tokens(1, count).to(device), []
    for i in range(count):
        found.append(step(input_ids=ids[:, i : i + 1], lengths=cache.lengths, **cache.buffers)[0])
        cache.commit(1)
    return found


def test_a_program_is_replayed() -> None:
    """Steps by replay are the steps of the program itself, one recording for all of them."""
    source = cached()
    recorder = Recorder()
    made = lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1})
    mine = decode(made.replayed(recorder), source, "cpu", 4)
    for got, wanted in zip(mine, decode(source.module(), source, "cpu", 4), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert recorder.recorded == 1


def test_what_cannot_be_replayed_says_why() -> None:
    source = cached()
    with pytest.raises(PlanError, match="eager library calls"):
        lower(source, "cpu", sizes={"B": 1, "S": 1}).replayed()
    with pytest.raises(PlanError, match="CPU has no graphs"):
        lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1}).replayed()


@CUDA
def test_a_device_replays_a_program() -> None:
    source = cached()
    made = lower(source, "cuda", dtype=torch.float32, sizes={"B": 1, "S": 1})
    mine = decode(made.replayed(), source, "cuda", 6)
    for got, wanted in zip(mine, decode(source.module(), source, "cpu", 6), strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-3, atol=1e-3)
