"""Values of packed weights in generated source: codes are cut out of the bytes that hold them, where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.backends.index import Index, Unfusable, add, bare, both, quotient, times
from graphopt.ops.quantised import place_bits

if TYPE_CHECKING:
    from graphopt.backends.emit import Emitter

_OPS = torch.ops.graphopt
UNPACKED = (_OPS.dequantise, _OPS.from_palette, _OPS.from_sparse)

Written = tuple[str, frozenset[str]]  # Text and the axes that it varies over.


def unpacked(emitter: Emitter, node: fx.Node, indices: Sequence[Index], guard: Index | None) -> Written:
    """One value of what a node unpacks."""
    *stored, one, other, _ = node.args
    if not isinstance(one, int) or not isinstance(other, int):
        raise Unfusable("codes of unknown width")
    if node.target is _OPS.dequantise.default:
        return on_grid(emitter, stored, one, other, list(indices), guard)
    dtype = node.meta["val"].dtype
    if node.target is _OPS.from_palette.default:
        return _of_palette(emitter, stored, one, other, dtype, list(indices), guard)
    return _of_few(emitter, stored, one, other, dtype, list(indices), guard)


def _code(emitter: Emitter, packed: object, bits: int, rest: list[Index], place: Index, guard: Index | None) -> Written:
    """The code at a place of a row, int32 (uint8 where it is a byte), out of the one or two bytes that hold its bits."""
    if bits == 8:
        whole = emitter.value(packed, [*rest, place], guard)
        return whole.text, whole.axes | place.axes
    start = times(place, bits)
    byte = quotient(start, 8)
    code = emitter.value(packed, [*rest, byte], guard)
    shift = f"({bare(start.text)}) % 8"
    text = f"({code.text}.to(tl.int32) >> ({shift}))"
    if 8 % bits:
        # A code may end in the next byte; the last one of a row never does.
        inside = Index(f"({shift} > {8 - bits})", place.axes)
        further = emitter.value(packed, [*rest, add(byte, Index("1"))], both(guard, inside))
        text = f"({text} | ({further.text}.to(tl.int32) << (8 - {shift})))"
    return f"({text} & {2**bits - 1})", code.axes | place.axes


def on_grid(
    emitter: Emitter, stored: Sequence[object], bits: int, group: int, indices: list[Index], guard: Index | None = None
) -> Written:
    """low + scale * code, at some place of rows that are `stored` as bytes, scale and lowest value."""
    packed, scale, low = stored
    rest, place = indices[:-1], indices[-1]
    code, axes = _code(emitter, packed, bits, rest, place, guard)
    where = [*rest, quotient(place, group)]
    step, least = emitter.value(scale, where, guard), emitter.value(low, where, guard)
    text = f"{least.read(torch.float32)} + {step.read(torch.float32)} * {code}.to(tl.float32)"
    return text, axes | step.axes | least.axes


def _of_palette(
    emitter: Emitter,
    stored: Sequence[object],
    bits: int,
    rows: int,
    dtype: torch.dtype,
    indices: list[Index],
    guard: Index | None,
) -> Written:
    """The value that a code names in the palette of its row."""
    packed, palette = stored
    text, axes = _code(emitter, packed, bits, indices[:-1], indices[-1], guard)
    code = Index(emitter.line(f"{text}.to(tl.int32)" if bits == 8 else text, "code", axes), axes)
    value = emitter.value(palette, [*indices[:-2], quotient(indices[-2], rows), code], guard)
    return value.read(dtype), value.axes | axes


def _of_few(
    emitter: Emitter,
    stored: Sequence[object],
    kept: int,
    of: int,
    dtype: torch.dtype,
    indices: list[Index],
    guard: Index | None,
) -> Written:
    """The sum of those stored values of a group whose place is the one that is asked for."""
    values, places = stored
    rest, place = indices[:-1], indices[-1]
    first, axes, terms = times(quotient(place, of), kept), place.axes, []
    for number in range(kept):
        entry = add(first, Index(str(number)))
        where, more = _code(emitter, places, place_bits(of), rest, entry, guard)
        value = emitter.value(values, [*rest, entry], guard)
        zero = "0.0" if dtype.is_floating_point else "0"
        terms.append(f"tl.where({where} == ({bare(place.text)}) % {of}, {value.read(dtype)}, {zero})")
        axes = axes | more | value.axes
    return " + ".join(terms), axes
