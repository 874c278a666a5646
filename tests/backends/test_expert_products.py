"""Products of tokens with their experts' matrices: the gathers happen in the loads, and many pairs are grouped by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends import lower
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.ops import dequantise
from graphopt.ops.quantised import encode, grid, pack
from tests.backends.cases import drawn
from tests.backends.conftest import close, reference, trace
from tests.tiny import program, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = Options(interpret=True)
EXPERTS, SIZE, WIDTH, TOP = 6, 37, 29, 2
Tensor = torch.Tensor


def rows_first(x: Tensor, bank: Tensor, bias: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Matrices times columns, as most families spell it: the gate and the weight of the pair join."""
    pairs = x[:, None].expand(-1, TOP, -1).reshape(-1, SIZE)
    chosen = experts.reshape(-1)
    return F.silu(torch.bmm(bank[chosen], pairs[..., None])[..., 0]) * weight.reshape(-1, 1)


def biased(x: Tensor, bank: Tensor, bias: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """Rows times matrices, with a bias of each expert's own."""
    pairs = x[:, None].expand(-1, TOP, -1).reshape(-1, SIZE) * 0.5
    chosen = experts.reshape(-1)
    product = torch.bmm(pairs[:, None], torch.index_select(bank.transpose(1, 2), 0, chosen))[:, 0]
    return product + torch.index_select(bias, 0, chosen)


def inputs(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, bank, bias, weight = drawn(dtype, (count, SIZE), (EXPERTS, WIDTH, SIZE), (EXPERTS, WIDTH), (count, TOP))
    # Expert 4 gets nothing, expert 1 the most.
    experts = torch.tensor([1, 5, 0, 1, 3, 1, 2]).repeat(count)[: count * TOP].reshape(count, TOP)
    return x, bank, bias, weight, experts


def made(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> Lowered:
    return lower_graph(trace(function, *given), "cpu", INTERPRET)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [rows_first, biased], ids=["rows_first", "biased"])
@pytest.mark.parametrize(("count", "template"), [(1, "expert_gemv"), (3, "expert_gemv"), (71, "expert_gemm")])
def test_products_of_experts(function: Callable[..., Tensor], count: int, template: str, dtype: torch.dtype) -> None:
    given = inputs(count, dtype)
    lowered = made(function, given)
    assert [group.kernel.template for group in lowered.groups] == [template]
    assert not [call for call in lowered.library if "index" in call or "bmm" in call]
    assert close(lowered(list(given)), reference(function, given)[0])


def test_pairs_of_any_number() -> None:
    """A symbolic number of tokens is grouped, down to one."""
    lowered = made(rows_first, inputs(5, torch.float32))
    for count in (1, 5, 40):
        given = inputs(count, torch.float32)
        assert close(lowered(list(given)), reference(rows_first, given)[0])


@pytest.mark.parametrize("count", [1, 19])
def test_packed_banks(count: int) -> None:
    """Matrices are unpacked in the loads, after the gather."""
    x, values, _, weight, experts = inputs(count, torch.float32)
    scale, low = grid(values, 4, 8)
    packed = pack(encode(values, scale, low, 4, 8), 4)

    def function(x: Tensor, packed: Tensor, scale: Tensor, low: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        return rows_first(x, dequantise(packed, scale, low, 4, 8, SIZE), x, weight, experts)

    given = (x, packed, scale, low, weight, experts)
    lowered = made(function, given)
    assert len(lowered.groups) == 1
    assert "dequantise" in lowered.groups[0].ops
    assert close(lowered(list(given)), reference(function, given)[0])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_program_with_experts(name: str) -> None:
    source = program(name)
    for sizes, shape in (({"B": 1, "S": 1}, (1, 1)), ({}, (2, 9))):
        lowered = lower(source, "cpu", interpret=True, sizes=sizes)
        ids = tokens(*shape)
        wanted = source.module()(input_ids=ids)[0]
        torch.testing.assert_close(lowered(input_ids=ids)[0], wanted, rtol=1e-4, atol=1e-4)
        assert not [call for call in lowered.lowered.library if "index" in call or "bmm" in call]
        found = {group.kernel.template for group in lowered.lowered.groups}
        assert ("expert_gemv" if sizes else "expert_gemm") in found


def test_other_gathers_stay_library_calls() -> None:
    """A number out of range is the library's to refuse."""

    def function(x: Tensor, index: Tensor) -> Tensor:
        return x[index] * 2

    given: tuple[Any, ...] = (torch.randn(7, 3), torch.tensor([1, 6]))
    assert any("index" in call for call in made(function, given).library)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 71])
def test_kernels_do_not_spill(count: int, target: str) -> None:
    for used in compile_ahead(made(rows_first, inputs(count, torch.bfloat16)).groups[0].kernel, target):
        assert used.spilled == 0, used
