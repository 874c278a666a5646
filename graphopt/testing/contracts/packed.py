"""Contracts of the ops that unpack weights."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from graphopt.ops import dequantise, from_palette, from_sparse
from graphopt.testing.contracts.contract import LENGTHS, Contract, Numbers, Sample

ROWS = st.sampled_from(((1,), (3,), (2, 3)))


def _bytes(random: Numbers, *sizes: int) -> torch.Tensor:
    return torch.randint(256, sizes, generator=random.generator).to(torch.uint8)


def _dequantise_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        bits, group, size = draw(st.integers(1, 8)), draw(st.integers(1, 9)), draw(st.sampled_from(LENGTHS))
        rows = draw(ROWS)
        packed = _bytes(random, *rows, -(-size * bits // 8))
        scale, low = (random(*rows, -(-size // group)) for _ in range(2))
        return Sample((packed, scale, low, bits, group, size))

    return samples()


def _palette_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        bits, shared, size = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.sampled_from(LENGTHS))
        rows = draw(ROWS)
        palette = random(*rows[:-1], -(-rows[-1] // shared), 2**bits)
        return Sample((_bytes(random, *rows, -(-size * bits // 8)), palette, bits, shared, size))

    return samples()


def _sparse_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = Numbers(draw, dtype)
        # Places of these need all values of their bits, so that any byte is a right one.
        of, size = draw(st.sampled_from((2, 4, 8, 16))), draw(st.sampled_from(LENGTHS))
        kept, rows = draw(st.integers(1, of)), draw(ROWS)
        stored = -(-size // of) * kept
        return Sample((random(*rows, stored), _bytes(random, *rows, -(-stored * _width(of) // 8)), kept, of, size))

    return samples()


def _width(of: int) -> int:
    return next(bits for bits in range(1, 9) if 2**bits >= of)


def _codes(packed: torch.Tensor, bits: int, count: int) -> list[list[int]]:
    """Each row is one number, lowest byte first; a code is `bits` of it."""
    numbers = (int.from_bytes(bytes(row), "little") for row in packed.reshape(-1, packed.shape[-1]).tolist())
    return [[number >> i * bits & (1 << bits) - 1 for i in range(count)] for number in numbers]


def _dequantise_reference(
    packed: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, group: int, size: int
) -> torch.Tensor:
    out = scale.new_zeros(*packed.shape[:-1], size)
    flat, steps, floors = out.view(-1, size), scale.reshape(-1, scale.shape[-1]), low.reshape(-1, low.shape[-1])
    for row, codes in enumerate(_codes(packed, bits, size)):
        for i, code in enumerate(codes):
            flat[row, i] = floors[row, i // group] + steps[row, i // group] * code
    return out


def _palette_reference(packed: torch.Tensor, palette: torch.Tensor, bits: int, rows: int, size: int) -> torch.Tensor:
    height = packed.shape[-2] if packed.dim() > 1 else 1
    tables = palette.reshape(-1, palette.shape[-2], palette.shape[-1])
    out = [
        [tables[row // height, row % height // rows, code].item() for code in codes]
        for row, codes in enumerate(_codes(packed, bits, size))
    ]
    return torch.tensor(out, dtype=palette.dtype).reshape(*packed.shape[:-1], size)


def _sparse_reference(values: torch.Tensor, places: torch.Tensor, kept: int, of: int, size: int) -> torch.Tensor:
    out = values.new_zeros(*values.shape[:-1], size)
    flat, rows = out.view(-1, size), values.reshape(-1, values.shape[-1])
    for row, codes in enumerate(_codes(places, _width(of), values.shape[-1])):
        for i, code in enumerate(codes):
            if i // kept * of + code < size:
                flat[row, i // kept * of + code] += rows[row, i]
    return out


PACKED = (
    Contract(dequantise, _dequantise_samples, _dequantise_reference),
    Contract(from_palette, _palette_samples, _palette_reference),
    Contract(from_sparse, _sparse_samples, _sparse_reference),
)
