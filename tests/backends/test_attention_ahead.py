"""Attention kernels that are no plain steps, compiled ahead of time for every target: whole texts, weighed values, masks."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.kernel import Kernel
from graphopt.backends.lowering import Options, lower_graph
from graphopt.ops import attention, bounded_attention, heavy_weights, held_attention
from tests.backends.cases import drawn
from tests.backends.conftest import trace
from tests.backends.test_attention import lowered_call
from tests.backends.test_held import GROUP, KV, heavy, held

SIZE, HEADS = 128, KV * GROUP
Tensor = torch.Tensor


def whole_text(padded: bool, heads: list[int]) -> Kernel:
    """StreamingLLM or DuoAttention over a prompt, renumbered."""
    q, k, v, turned, sinks = drawn(
        torch.bfloat16, (2, HEADS, 150, SIZE), (2, KV, 150, SIZE), (2, KV, 150, SIZE), (2, HEADS, 150, SIZE), (HEADS,)
    )
    mask = torch.ones(2, 150, dtype=torch.bool) if padded else None
    given = (q, k, v, mask, sinks, 0.3, True, None, None, turned, None, heads, 3, 20, 0, False)
    return lowered_call(bounded_attention, *given).groups[0].kernel


def weighed() -> Kernel:
    """H2O: values of what is held, by weights that are known."""
    given = heavy(torch.bfloat16)
    rest = held("window", 1, torch.bfloat16)
    (values,) = drawn(torch.bfloat16, (2, KV, 37, rest[2].shape[3]))
    arguments = (*rest[:3], given[2], values, *rest[5:8], heavy_weights(*given), *rest[9:13], 4, 33, False)
    return lowered_call(held_attention, *arguments).groups[0].kernel


def masked(documents: bool, queries: int) -> Kernel:
    """ALiBi or a mask of documents, computed in the loop over keys."""

    def biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        bias = (columns - rows).to(q.dtype)[None, None] * slopes[None, :, None, None]
        return attention(q, k, v, bias, None, 0.2, False, None, None)  # type: ignore[no-any-return]

    def apart(q: Tensor, k: Tensor, v: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        seen = mine[:, None, :, None] == theirs[:, None, None, :]
        return attention(q, k, v, seen, None, 0.2, False, None, None)  # type: ignore[no-any-return]

    q, k, v, slopes = drawn(torch.bfloat16, (2, HEADS, queries, SIZE), (2, KV, 77, SIZE), (2, KV, 77, SIZE), (HEADS,))
    theirs = torch.arange(77).div(20, rounding_mode="floor").expand(2, -1).contiguous()
    function, more = (apart, (theirs[:, :queries].contiguous(), theirs)) if documents else (biased, (slopes,))
    (group,) = lower_graph(trace(function, q, k, v, *more), "cpu", Options(interpret=True)).groups
    return group.kernel


KERNELS = {
    "bounded, a whole text": lambda: whole_text(padded=False, heads=[0, 1]),
    "bounded, padded, one head whole": lambda: whole_text(padded=True, heads=[1]),
    "weighed": weighed,
    "alibi, one query": lambda: masked(documents=False, queries=1),
    "alibi, a text": lambda: masked(documents=False, queries=41),
    "documents, one query": lambda: masked(documents=True, queries=1),
    "documents, a text": lambda: masked(documents=True, queries=41),
}
# One query of a head, or one token's weights: steps of decoding.
STEPS = {"weighed", "alibi, one query", "documents, one query"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_them_and_steps_do_not_spill(target: str) -> None:
    for name, make in KERNELS.items():
        for used in compile_ahead(make(), target):
            assert used.registers > 0, (name, used)
            assert used.spilled == 0 or name not in STEPS, (name, used)
