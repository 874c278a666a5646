"""Functions whose kernels are generated, at sizes that are no multiple of any block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from graphopt.ops import library


def drawn(dtype: torch.dtype, *sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Random tensors: normal floats, small integers, coin tosses."""
    made = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return tuple(torch.rand(size, generator=made) > 0.5 for size in sizes)
    if dtype.is_floating_point:
        return tuple(torch.randn(size, generator=made).to(dtype) for size in sizes)
    return tuple(torch.randint(0, 7, size, generator=made).to(dtype) for size in sizes)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def gelu_gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def broadcast(x: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return torch.where(x > row, x - column, row.exp()) * 0.5 + 1


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 0.7, -1)


def softmax_first(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, 0)


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, -1)


def rms_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, library._rms_norm(total, weight, 1e-5, False)


def layer_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, 1e-5)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return library._rotary(x.transpose(1, 2), cos, sin, False)


def rotary_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return library._rotary(x, cos, sin, True)


def normed_rotary(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return library._rotary(library._rms_norm(x, weight, 1e-6, True).transpose(1, 2), cos, sin, False)


def variance(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.var(1), (x - x.mean(1, keepdim=True)).abs().amax(1)


def padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (2, 3, 1, 0), value=1.5) * 2


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, 1:], x[:, :1] * 2, x], 1).flatten(1) + 1


def causal_mask(x: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None, :]
    return torch.where(columns <= rows, x, torch.tensor(-1.0).to(x.dtype))


def integers(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x * 3 + y).clamp(min=2), ((x & 3) << 1) | (y >> 1)


def counted(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (x == y).sum(-1), x.to(torch.float32).mean(-1)


def booleans(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x & ~y, torch.logical_xor(x, y).any(-1), (x | y).all(-1)


Case = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
_TABLE = ((1, 1, 5, 6), (1, 1, 5, 6))
FLOATING: dict[str, Case] = {
    "gated": (gated, ((3, 5, 37), (3, 5, 37))),
    "gelu_gated": (gelu_gated, ((3, 5, 38),)),
    "broadcast": (broadcast, ((3, 5, 7), (7,), (3, 1, 1))),
    "softmax": (softmax, ((3, 5, 37),)),
    "softmax_first": (softmax_first, ((33, 5),)),
    "log_softmax": (log_softmax, ((4, 19),)),
    "rms_residual": (rms_residual, ((2, 5, 33), (2, 5, 33), (33,))),
    "layer_residual": (layer_residual, ((2, 5, 33), (2, 5, 33), (33,), (33,))),
    "rotary": (rotary, ((2, 5, 3, 10), *_TABLE)),
    "rotary_interleaved": (rotary_interleaved, ((2, 3, 5, 6), *_TABLE)),
    "normed_rotary": (normed_rotary, ((2, 5, 3, 6), (6,), *_TABLE)),
    "variance": (variance, ((3, 11, 5),)),
    "padded": (padded, ((3, 4, 5),)),
    "shifted": (shifted, ((3, 4, 5),)),
    "causal_mask": (causal_mask, ((2, 9, 9),)),
}
INTEGER: dict[str, Case] = {
    "integers": (integers, ((3, 5, 7), (5, 7))),
    "counted": (counted, ((3, 5, 7), (3, 5, 7))),
}
BOOLEAN: dict[str, Case] = {"booleans": (booleans, ((3, 5, 7), (3, 5, 7)))}
