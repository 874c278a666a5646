"""Generated products: norms and dequantisation before, bias, activation, gate and residual after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.ops import library
from tests.backends.cases import drawn
from tests.backends.conftest import close, reference, trace

FORCED = Options(interpret=True, products="triton")
Tensor = torch.Tensor


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def biased_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def residual(x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    return before + F.linear(x, weight)


def normed(x: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    return F.linear(library._rms_norm(x, gain, 1e-5, False), weight)


def layer_normed(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    return F.relu(F.linear(F.layer_norm(x, (x.shape[-1],), gain, shift), weight))


def int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale[:, None])


def int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Two values a byte, a scale and a zero point for every group of 8."""
    values = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    grouped = values.to(x.dtype).unflatten(1, (-1, 8))
    return F.linear(x, ((grouped - zero[..., None]) * scale[..., None]).flatten(1))


def inputs_of(name: str, rows: tuple[int, ...], dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """A case: 24 features in, 19 out."""
    x, gain, shift, weight, other, bias, before = drawn(
        dtype, (*rows, 24), (24,), (24,), (19, 24), (19, 24), (19,), (*rows, 19)
    )
    made = torch.Generator().manual_seed(1)
    scale = torch.rand(19, generator=made).to(dtype)
    whole = torch.randint(-127, 128, (19, 24), generator=made, dtype=torch.int8)
    packed = torch.randint(0, 256, (19, 12), generator=made, dtype=torch.uint8)
    groups = torch.rand(19, 3, generator=made).to(dtype), torch.full((19, 3), 8.0).to(dtype)
    cases: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "gated_mlp": (gated_mlp, (x, weight, other)),
        "biased_gelu": (biased_gelu, (x, weight, bias)),
        "residual": (residual, (x, weight, before)),
        "normed": (normed, (x, gain, weight)),
        "layer_normed": (layer_normed, (x, gain, shift, weight)),
        "int8": (int8, (x, whole, scale)),
        "int4": (int4, (x, packed, *groups)),
    }
    return cases[name]


NAMES = ("gated_mlp", "biased_gelu", "residual", "normed", "layer_normed", "int8", "int4")
ROWS = {"one": (1, 1), "some": (2, 5)}


def check(name: str, rows: str, dtype: torch.dtype) -> Lowered:
    function, inputs = inputs_of(name, ROWS[rows], dtype)
    made = lower_graph(trace(function, *inputs), "cpu", FORCED)
    (wanted,) = reference(function, inputs)
    assert close(made(list(inputs)), wanted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_one_kernel_equals_the_reference(name: str, rows: str, dtype: torch.dtype) -> None:
    made = check(name, rows, dtype)
    assert [group.kernel.template for group in made.groups] == ["gemv" if rows == "one" else "gemm"]
    assert set(made.library) <= {"aten.sym_size.int", "aten.view.default", "aten._unsafe_view.default"}, made.library


def test_the_library_keeps_products_with_many_rows() -> None:
    function, inputs = inputs_of("gated_mlp", (2, 5), torch.float32)
    made = lower_graph(trace(function, *inputs), "cpu", Options(interpret=True))
    assert made.library["aten.mm.default"] == 2
    assert [group.ops for group in made.groups] == [("silu", "mul")]


def test_a_norm_that_several_products_read_is_computed_once() -> None:
    def function(x: Tensor, gain: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        y = library._rms_norm(x, gain, 1e-5, False)
        return F.linear(y, query), F.linear(y, key)

    inputs = drawn(torch.float32, (1, 24), (24,), (19, 24), (7, 24))
    made = lower_graph(trace(function, *inputs), "cpu", FORCED)
    assert sorted(group.kernel.template for group in made.groups) == ["gemv", "gemv", "reduction"]
    for mine, wanted in zip(made(list(inputs)), function(*inputs), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_vector_kernels_do_not_spill(target: str) -> None:
    for name in ("gated_mlp", "normed", "int4"):
        function, inputs = inputs_of(name, (1, 1), torch.bfloat16)
        for group in lower_graph(trace(function, *inputs), "cpu", FORCED).groups:
            for used in compile_ahead(group.kernel, target):
                assert used.spilled == 0, (name, used)
