"""Weights in few bits: how values become whole numbers, how these are packed, and the ops that undo both.

Grids: a group of consecutive values along the last axis shares a scale and a lowest value: w is about low + scale * code,
codes from 0 to 2^bits - 1. Palettes: some rows share 2^bits values, of which a code names one. N of M: of every M
consecutive values only N are stored, each with its place among the M. Codes and places are packed into bytes without
gaps, each row on its own, lowest bit first.
"""

from __future__ import annotations

import torch

from graphopt.ops.library import _define


def groups(size: int, group: int) -> int:
    """How many groups a row of `size` values has; the last one may be shorter."""
    return -(-size // group)


def row_bytes(size: int, bits: int) -> int:
    """Bytes that hold the codes of a row of `size` values."""
    return -(-size * bits // 8)


def grid(values: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and lowest value `[..., groups]` of rows `[..., size]`: from the least to the largest value of each group.

    With one bit the two values are plus and minus the mean magnitude, the best two of opposite sign for weights around 0.
    """
    size = values.shape[-1]
    count = groups(size, group)
    missing = count * group - size
    last = values[..., -1:].expand(*values.shape[:-1], missing)
    rows = torch.cat([values, last], dim=-1).unflatten(-1, (count, group))
    if bits == 1:
        there = torch.ones(size, dtype=values.dtype, device=values.device)
        held = torch.nn.functional.pad(there, (0, missing)).reshape(count, group)
        mean = (rows.abs() * held).sum(-1) / held.sum(-1)
        return 2 * mean, -mean
    low, high = rows.amin(-1), rows.amax(-1)
    return (high - low) / (2**bits - 1), low


def encode(values: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Codes `[..., size]`, uint8: each value's nearest point on the grid of its group."""
    size = values.shape[-1]
    scale, low = (part.repeat_interleave(group, dim=-1)[..., :size] for part in (scale, low))
    steps = torch.where(scale > 0, (values - low) / torch.where(scale > 0, scale, torch.ones_like(scale)), 0.0)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Where in a byte the codes begin that lie in it as a whole."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., size]` as bytes `[..., ceil(size * bits / 8)]`."""
    if bits == 8:
        return codes
    if 8 % bits == 0:
        each = 8 // bits
        bytes_ = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
        return (bytes_ << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)
    places = torch.arange(bits, device=codes.device)
    stream = ((codes[..., None] >> places) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Codes `[..., size]` of packed rows."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        codes = (packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)
        return codes.flatten(-2)[..., :size]
    stream = ((packed[..., None] >> torch.arange(8, device=packed.device)) & 1).flatten(-2)
    each = stream[..., : size * bits].unflatten(-1, (size, bits))
    return (each << torch.arange(bits, device=packed.device)).sum(-1).to(torch.uint8)


def quantise(values: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows `[..., size]` as packed codes `[..., bytes]` with scale and lowest value `[..., groups]` in their own dtype."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    # Codes are those of the grid as it is stored.
    scale, low = (part.to(values.dtype) for part in grid(wide, bits, group))
    return pack(encode(wide, scale.to(wide.dtype), low.to(wide.dtype), bits, group), bits), scale, low


def _dequantise(
    packed: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, bits: int, group: int, size: int
) -> torch.Tensor:
    """low + scale * code for rows packed in `[..., bytes]` with scale and low `[..., groups]`, to `[..., size]`."""
    kind = torch.promote_types(scale.dtype, torch.float32)
    codes = unpack(packed, bits, size).to(kind)
    wide = [part.to(kind).repeat_interleave(group, dim=-1)[..., :size] for part in (scale, low)]
    return (wide[1] + wide[0] * codes).to(scale.dtype)


dequantise = _define(
    "dequantise(Tensor packed, Tensor scale, Tensor low, int bits, int group, int size) -> Tensor",
    _dequantise,
    lambda packed, scale, low, bits, group, size: scale.new_empty((*packed.shape[:-1], size)),
)


def place_bits(of: int) -> int:
    """Bits of a place among `of` values."""
    return max(1, (of - 1).bit_length())


def keep_largest(values: torch.Tensor, kept: int, of: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` largest of every `of` values of rows `[..., size]`, in order, and their packed places.

    Values `[..., ceil(size / of) * kept]`; what lies beyond the end of a row counts as zeros.
    """
    rows = torch.nn.functional.pad(values, (0, -values.shape[-1] % of)).unflatten(-1, (-1, of))
    places = rows.abs().argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(dim=-1).values
    return rows.gather(-1, places).flatten(-2), pack(places.flatten(-2).to(torch.uint8), place_bits(of))


def _from_palette(packed: torch.Tensor, palette: torch.Tensor, bits: int, rows: int, size: int) -> torch.Tensor:
    """The values that codes packed in `[..., R, bytes]` name, `[..., R, size]`.

    `rows` consecutive rows share one of the palettes `[..., ceil(R / rows), 2^bits]`.
    """
    codes = unpack(packed, bits, size).to(torch.int64)
    wide = palette.repeat_interleave(rows, dim=-2)[..., : packed.shape[-2], :]
    return wide.gather(-1, codes)


def _from_sparse(values: torch.Tensor, places: torch.Tensor, kept: int, of: int, size: int) -> torch.Tensor:
    """Rows `[..., size]` of which `kept` of every `of` values are given `[..., ceil(size / of) * kept]`, the others zero.

    `places` `[..., bytes]` are packed; values of one place add up.
    """
    where = unpack(places, place_bits(of), values.shape[-1]).to(torch.int64)
    start = torch.arange(groups(size, of), device=values.device).repeat_interleave(kept) * of
    wide = values.new_zeros((*values.shape[:-1], groups(size, of) * of))
    return wide.scatter_add(-1, start + where, values)[..., :size]


from_palette = _define(
    "from_palette(Tensor packed, Tensor palette, int bits, int rows, int size) -> Tensor",
    _from_palette,
    lambda packed, palette, bits, rows, size: palette.new_empty((*packed.shape[:-1], size)),
)
from_sparse = _define(
    "from_sparse(Tensor values, Tensor places, int kept, int of, int size) -> Tensor",
    _from_sparse,
    lambda values, places, kept, of, size: values.new_empty((*values.shape[:-1], size)),
)
