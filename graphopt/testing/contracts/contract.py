"""What a contract of an op is, and the numbers that its samples are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

Arguments = tuple[Any, ...]
# Powers of two, their neighbours, and sizes that no tile divides.
LENGTHS = (1, 2, 3, 5, 8, 17, 33)


@dataclass(frozen=True)
class Sample:
    """Arguments of an op in its schema's order; `judged` is true where the result means something (None: everywhere)."""

    arguments: Arguments
    judged: torch.Tensor | None = None

    def __str__(self) -> str:
        return ", ".join(said(value) for value in self.arguments)


@dataclass(frozen=True)
class Contract:
    """What may be asked of an op and what it means; `writes` are positions of arguments that it writes into.

    `reference` takes float64 arguments and returns what the op returns; into the arguments of `writes` it writes, too.
    """

    op: Any
    sample: Callable[[torch.dtype], st.SearchStrategy[Sample]]
    reference: Callable[..., torch.Tensor]
    writes: tuple[int, ...] = ()


def said(value: Any) -> str:
    """A value in a message: of a tensor its type and sizes."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"


class Numbers:
    """Random tensors of one sample, no two alike."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 7)))
        self.dtype = dtype

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None, turned: bool = False) -> torch.Tensor:
        """Normal numbers; `turned` lays axes 1 and 2 out as a transposed projection does."""
        if turned:
            first, second, third, *rest = sizes
            return self(first, third, second, *rest, dtype=dtype).transpose(1, 2)
        return torch.randn(sizes, generator=self.generator).to(dtype or self.dtype)
