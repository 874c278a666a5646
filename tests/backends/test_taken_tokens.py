"""Choices of tokens are read through: attention loads what an index names, and no chosen copy is made first."""

from __future__ import annotations

import json

import pytest
import torch

from graphopt.backends import lower
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.ops import attention, take_tokens
from graphopt.passes.tokens.drop_tokens import DropTokens
from graphopt.passkit import Context
from graphopt.passkit.edits import apply_edits
from graphopt.views import Views
from tests.backends.cases import drawn
from tests.backends.conftest import close, reference, trace
from tests.tiny import program, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, KV, COUNT, KEPT, SIZE = 4, 2, 83, 37, 24
Tensor = torch.Tensor


def inputs(dtype: torch.dtype, size: int = SIZE) -> tuple[Tensor, ...]:
    """Queries, keys and values of all tokens, one bias for all rows, and which tokens stay in each row."""
    q, k, v, bias = drawn(
        dtype, (2, HEADS, COUNT, size), (2, KV, COUNT, size), (2, KV, COUNT, size), (1, HEADS, COUNT, COUNT)
    )
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(COUNT, generator=generator)[:KEPT].sort().values for _ in range(2)])
    return q, k, v, bias, index, torch.arange(KEPT) % 5 > 0


def chosen(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """What stays attends to what stays."""
    near, far, gain = (take_tokens(x, index, 2) for x in (q, k, v))
    return attention(near, far, gain, real.expand(2, -1), None, 0.2, True, None, None)  # type: ignore[no-any-return]


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """A bias of places is read at those of the tokens, by rows and by columns; the last query alone asks."""
    mask = take_tokens(take_tokens(bias, index[:, -1:], 2), index, 3)
    far, gain = (take_tokens(x, index, 2) for x in (k, v))
    return attention(take_tokens(q, index[:, -1:], 2), far, gain, mask, None, 0.2, False, None, None)  # type: ignore[no-any-return]


def again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """A second choice among what stayed."""
    twice = take_tokens(index, index % 29, 1)
    return attention(q, take_tokens(k, twice, 2), take_tokens(v, twice, 2), None, None, 0.2, False, None, None)  # type: ignore[no-any-return]


def made(function: object, given: tuple[Tensor, ...]) -> Lowered:
    return lower_graph(trace(function, *given), "cpu", Options(interpret=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [chosen, biased, again], ids=["chosen", "biased", "again"])
def test_attention_reads_through_the_index(function: object, dtype: torch.dtype) -> None:
    given = inputs(dtype)
    lowered = made(function, given)
    assert not [call for call in lowered.library if "take_tokens" in call and function is not again]
    assert any("take_tokens" in group.ops and "attention" in group.ops for group in lowered.groups)
    assert close(lowered(list(given)), reference(function, given)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_that_reads_through_an_index_does_not_spill(target: str) -> None:
    lowered = made(biased, inputs(torch.bfloat16, 128))
    for used in compile_ahead(lowered.groups[0].kernel, target):
        assert used.spilled == 0, used


def test_a_program_from_which_tokens_leave() -> None:
    source = program("llama")
    views = Views(source)
    options = {"span": "text", "layers": [1, 2], "keep": ["60%", "40%"], "score": "norm"}
    step = DropTokens.model_validate_json(json.dumps(options))
    plan = step.plan(Context(views, tuple(range(len(views.blocks)))))
    dropped = apply_edits(source, views, plan.edits)
    lowered = lower(dropped, "cpu", interpret=True)
    given = {"input_ids": tokens(2, 23)}
    for mine, wanted in zip(lowered(**given), dropped.module()(**given), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
