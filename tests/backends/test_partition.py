"""What becomes one kernel, and that what must keep its order keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.backends.lowering import Lowered, Options, lower_graph
from tests.backends.conftest import trace


def lower(function: Callable[..., Any], *inputs: torch.Tensor) -> Lowered:
    return lower_graph(trace(function, *inputs), "cpu", Options(interpret=True))


def test_a_producer_joins_only_without_a_way_around() -> None:
    """exp feeds the sum directly and through a sort: merging exp with the sum would close a cycle."""

    def function(x: torch.Tensor) -> torch.Tensor:
        wide = x.exp()
        ordered = torch.sort(wide, -1).values
        return wide * 2 + ordered

    x = torch.randn(3, 5)
    made = lower(function, x)
    assert {op for group in made.groups for op in group.ops} == {"exp", "mul", "add"}
    assert not any({"exp", "add"} <= set(group.ops) for group in made.groups)
    torch.testing.assert_close(made([x]), function(x))


def test_a_constant_and_a_view_cost_no_kernel() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.view(5, 2, 4).transpose(0, 1) + torch.ones(4)).reshape(2, 20)

    x = torch.randn(5, 8)
    made = lower(function, x)
    assert len(made.groups) == 1
    torch.testing.assert_close(made([x]), function(x))


def test_library_calls_stay_between_groups() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.relu((x * 2) @ w + 1).cumsum(-1) * 3

    x, w = torch.randn(5, 8), torch.randn(8, 6)
    made = lower(function, x, w)
    assert {"aten.mm.default", "aten.cumsum.default"} <= set(made.library)
    torch.testing.assert_close(made([x, w]), function(x, w))


def test_writes_keep_their_place() -> None:
    """A graph that writes its input after reading it: the readers run before."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = x * 2
        x.copy_(y)
        return before + x * 3

    x, y = torch.randn(5), torch.randn(5)
    made = lower(function, x, y)
    mine, wanted = x.clone(), x.clone()
    torch.testing.assert_close(made([mine, y]), function(wanted, y))
    torch.testing.assert_close(mine, wanted)


def test_readers_of_one_tensor_share_a_kernel() -> None:
    made = lower(lambda x: (x.sum(-1), x.abs().amax(-1)), torch.randn(5, 7))
    assert len(made.groups) == 1


def test_dtypes_that_are_not_generated_run_as_library_calls() -> None:
    x = torch.randn(5, 7, dtype=torch.complex64)
    made = lower(lambda x: x * 2 + 1, x)
    assert not made.groups
    torch.testing.assert_close(made([x]), x * 2 + 1)
