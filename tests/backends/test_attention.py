"""Generated attention against the op's contract, and what is left out of the source when an attribute does not ask for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.ops import attention, cached_attention
from graphopt.ops.trees import straight
from graphopt.testing.lowering import check_lowering

INTERPRET = Options(interpret=True)


def lowered(*arguments: Any) -> Lowered:
    """The kernel of one attention call at fixed sizes."""
    return lowered_call(attention if len(arguments) == 9 else cached_attention, *arguments)


def lowered_call(op: Any, *arguments: Any) -> Lowered:
    """The kernel of one call of an op at fixed sizes."""
    graph, mode = fx.Graph(), FakeTensorMode()
    nodes = []
    for argument in arguments:
        node = argument
        if isinstance(argument, torch.Tensor):
            node = graph.placeholder(f"in{len(nodes)}")
            node.meta["val"] = mode.from_tensor(argument)
        nodes.append(node)
    call = graph.call_function(op, tuple(nodes))
    with mode:
        call.meta["val"] = op(*(n.meta["val"] if isinstance(n, fx.Node) else n for n in nodes))
    graph.output(call)
    return lower_graph(fx.GraphModule({}, graph), "cpu", INTERPRET)


def run(*arguments: Any) -> torch.Tensor:
    made = lowered(*arguments)
    q, v = arguments[0], arguments[2]
    assert bool(made.groups) == (q.shape[3] > 1 and v.shape[3] > 1)
    result: torch.Tensor = made([a for a in arguments if isinstance(a, torch.Tensor)])
    return result


def test_keeps_the_contract_of_attention() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert check_lowering(attention, run, dtypes=dtypes, max_examples=25) >= 60


def test_keeps_the_contract_of_cached_attention() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert check_lowering(cached_attention, run, dtypes=dtypes, max_examples=25) >= 60


def example(queries: int, dtype: torch.dtype = torch.bfloat16, size: int = 128) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 8, queries, size).to(dtype)
    k, v = (torch.randn(2, 2, 300, size).to(dtype) for _ in range(2))
    return q, k, v


def test_blocks_and_splits_meet() -> None:
    """Sizes of several blocks and splits: 300 keys, 70 and 1 queries."""
    for queries in (70, 1):
        q, k, v = example(queries, torch.float32, 16)
        for causal, window in ((False, None), (True, None), (True, 90)):
            arguments = (q, k, v, None, torch.randn(8), 0.25, causal, window, 20.0)
            torch.testing.assert_close(run(*arguments), attention(*arguments), rtol=1e-4, atol=1e-5)


def test_the_source_follows_the_attributes() -> None:
    q, k, v = example(70)
    plain = lowered(q, k, v, None, None, 0.1, False, None, None).groups[0].kernel.source
    full = lowered(q, k, v, None, torch.zeros(8), 0.1, True, 64, 30.0).groups[0].kernel.source
    for word in ("tanh", "low = tl.maximum", "t <= m", "top = tl.maximum(best, v"):
        assert (word in full, word in plain) == (True, False), word
    assert "def join" in lowered(*example(1), None, None, 0.1, True, None, None).groups[0].kernel.source


def cached(queries: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """A step over a cache that holds 190 and 260 entries of 300."""
    q, keys, values = example(queries, dtype, 64)
    k, v = (torch.randn(2, 2, queries, 64).to(dtype) for _ in range(2))
    lengths = torch.tensor([190, 260])
    return (
        q,
        k,
        v,
        keys,
        values,
        lengths,
        lengths[:, None] + torch.arange(queries),
        straight(queries),
        None,
        None,
        0.2,
        50,
        None,
    )


def test_long_caches_with_a_window() -> None:
    for queries in (1, 9):
        arguments = cached(queries, torch.float32)
        mine = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.testing.assert_close(run(*mine), cached_attention(*arguments), rtol=1e-4, atol=1e-5)
        assert torch.equal(mine[3], arguments[3])
        assert torch.equal(mine[4], arguments[4])


@pytest.mark.parametrize("target", TARGETS)
def test_decoding_does_not_spill(target: str) -> None:
    one = lowered(*example(1), None, None, 0.1, True, None, None).groups[0].kernel
    for kernel in (one, lowered(*cached(1)).groups[0].kernel):
        for used in compile_ahead(kernel, target):
            assert used.spilled == 0, used
