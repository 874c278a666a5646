"""Packed weights in kernels: grids, palettes and N of M, on their own and as a part of products, at all widths."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends import lower
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Options, lower_graph
from graphopt.compiler.compile import compile
from graphopt.ops import dequantise, from_palette, from_sparse
from graphopt.ops.quantised import encode, grid, keep_largest, pack
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec
from tests.backends.cases import drawn
from tests.backends.conftest import close, reference, trace
from tests.tiny import program, tokens

FORCED = Options(interpret=True, products="triton")
SIZE, GROUP = 27, 8  # neither fills its last byte nor its last group
WIDTHS = (1, 2, 3, 4, 7, 8)
Tensor = torch.Tensor


def packed(bits: int, dtype: torch.dtype, rows: tuple[int, ...] = (19,)) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and lowest value of a random matrix."""
    (values,) = drawn(torch.float32, (*rows, SIZE))
    scale, low = grid(values, bits, GROUP)
    return pack(encode(values, scale, low, bits, GROUP), bits), scale.to(dtype), low.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 5)], ids=["one", "some"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_product_reads_packed_weights(bits: int, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    def function(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.linear(x, dequantise(codes, scale, low, bits, GROUP, SIZE), bias))

    x, bias = drawn(dtype, (*rows, SIZE), (19,))
    inputs = (x, *packed(bits, dtype), bias)
    made = lower_graph(trace(function, *inputs), "cpu", FORCED)
    assert close(made(list(inputs)), reference(function, inputs)[0])
    assert [group.kernel.template for group in made.groups] == ["gemv" if rows == (1, 1) else "gemm"]
    assert not any("dequantise" in name or "mm" in name for name in made.library)


def from_colors(bits: int) -> Callable[..., Tensor]:
    return lambda x, codes, palette: F.silu(F.linear(x, from_palette(codes, palette, bits, 5, SIZE)))


def from_few(kept: int, of: int) -> Callable[..., Tensor]:
    return lambda x, values, places: F.silu(F.linear(x, from_sparse(values, places, kept, of, SIZE)))


def colors(bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of a matrix whose rows share palettes by five, the last one by four, and the palettes."""
    codes = torch.randint(2**bits, (19, SIZE), generator=torch.Generator().manual_seed(bits))
    return pack(codes.to(torch.uint8), bits), drawn(dtype, (4, 2**bits))[0]


def few(kept: int, of: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random matrix of which `kept` of every `of` values are left."""
    values, places = keep_largest(drawn(torch.float32, (19, SIZE))[0], kept, of)
    return values.to(dtype), places


def check_product(function: Callable[..., Tensor], x: Tensor, *weight: Tensor) -> None:
    made = lower_graph(trace(function, x, *weight), "cpu", FORCED)
    assert close(made([x, *weight]), reference(function, (x, *weight))[0])
    assert [group.kernel.template for group in made.groups] == ["gemv" if x.numel() == SIZE else "gemm"]
    assert not made.library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 5)], ids=["one", "some"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_product_reads_palettes(bits: int, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    check_product(from_colors(bits), drawn(dtype, (*rows, SIZE))[0], *colors(bits, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (2, 5)], ids=["one", "some"])
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 8)])
def test_a_product_reads_few_of_many(kept: int, of: int, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    check_product(from_few(kept, of), drawn(dtype, (*rows, SIZE))[0], *few(kept, of, dtype))


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (3, 8), (4, 4)])
def test_the_largest_of_a_group_stay(kept: int, of: int) -> None:
    (weight,) = drawn(torch.float32, (5, SIZE))
    values, places = keep_largest(weight, kept, of)
    dense = from_sparse(values, places, kept, of, SIZE)
    assert torch.equal(dense[dense != 0], weight[dense != 0])
    for start in range(0, SIZE, of):
        group, left = weight[:, start : start + of].abs(), dense[:, start : start + of].abs()
        wanted = group.sort(-1, descending=True).values[:, :kept].sum(-1)
        torch.testing.assert_close(left.sum(-1), wanted)
    bits = max(1, (of - 1).bit_length())
    assert places.shape[-1] == -(-values.shape[-1] * bits // 8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_on_their_own(bits: int) -> None:
    """A library product reads what one kernel unpacks, banks of matrices and turned ones included."""

    def function(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        return dequantise(codes, scale, low, bits, GROUP, SIZE).transpose(-2, -1) * 1.0

    inputs = packed(bits, torch.float32, (3, 5))
    made = lower_graph(trace(function, *inputs), "cpu", FORCED)
    torch.testing.assert_close(made(list(inputs)), function(*inputs))
    assert len(made.groups) == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantised_program(bits: int) -> None:
    text = json.dumps({"graphopt": 1, "steps": [{"use": "quantize", "bits": bits, "group": 8}]})
    source = compile(program("llama"), parse_spec(text, registry=PassRegistry()), verify="off")
    made = lower(source, "cpu", interpret=True, sizes={"B": 1, "S": 1})
    ids = tokens(1, 1)
    torch.testing.assert_close(made(input_ids=ids)[0], source.module()(input_ids=ids)[0], rtol=1e-4, atol=1e-4)
    assert "graphopt.dequantise.default" not in made.lowered.library
    assert any("dequantise" in group.ops and group.kernel.template == "gemv" for group in made.lowered.groups)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matrix_vector_kernels_do_not_spill(bits: int, target: str) -> None:
    def function(x: Tensor, codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        return F.linear(x, dequantise(codes, scale, low, bits, GROUP, SIZE))

    unspilled(function, packed(bits, torch.bfloat16), target)


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_vector_kernels_of_palettes_do_not_spill(target: str) -> None:
    unspilled(from_colors(4), colors(4, torch.bfloat16), target)


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_vector_kernels_of_few_values_do_not_spill(target: str) -> None:
    unspilled(from_few(2, 4), few(2, 4, torch.bfloat16), target)


def unspilled(function: Callable[..., Tensor], weight: tuple[Tensor, ...], target: str) -> None:
    inputs = (*drawn(torch.bfloat16, (1, SIZE)), *weight)
    (group,) = lower_graph(trace(function, *inputs), "cpu", FORCED).groups
    assert all(used.spilled == 0 for used in compile_ahead(group.kernel, target))
