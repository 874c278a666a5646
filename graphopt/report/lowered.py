"""Reports of lowered programs: for each kernel its ops, what it moves and computes, and its share of the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from graphopt.backends.programs import LoweredProgram
from graphopt.backends.report import CallReport, GroupReport
from graphopt.report.page import Page


@dataclass(frozen=True)
class Roof:
    """What a device reaches: bytes a second of a large copy and FLOP a second of a large bf16 product."""

    name: str
    bandwidth: float
    flops: float

    def seconds(self, moved: float, computed: float) -> float:
        """The least time for so many bytes and FLOPs."""
        return max(moved / self.bandwidth, computed / self.flops)


# Rates that copies and products reach on the device, not those of its data sheet.
ROOFS = {"h200": Roof("h200", 4.3e12, 790e12)}


@dataclass(frozen=True)
class Row:
    """One kernel or library call with how often it runs; bytes and FLOPs are those of all its runs."""

    name: str
    count: int
    ops: tuple[str, ...]
    moved: float
    computed: float
    share: float
    source: str | None


def rows(lowered: LoweredProgram, sizes: Mapping[str, int], roof: Roof) -> list[Row]:
    """What runs, most of the bound time first; equal kernels are one row."""
    groups: dict[str, list[GroupReport | CallReport]] = {}
    for each in (*lowered.lowered.groups, *lowered.lowered.calls):
        groups.setdefault(each.name, []).append(each)
    at = {symbol: sizes[str(name)] for symbol, name in lowered.symbols.items()}
    numbers = {
        name: (sum(_number(e.bytes, at) for e in found), sum(_number(e.flops, at) for e in found))
        for name, found in groups.items()
    }
    times = {name: roof.seconds(*moved) for name, moved in numbers.items()}
    total = sum(times.values()) or 1.0
    made = [
        Row(name, len(found), found[0].ops, *numbers[name], times[name] / total,
            found[0].kernel.source if isinstance(found[0], GroupReport) else None)
        for name, found in groups.items()
    ]  # fmt: skip
    return sorted(made, key=lambda row: -row.share)


def _number(expr: sympy.Expr, at: Mapping[sympy.Symbol, int]) -> float:
    return float(sympy.sympify(expr).subs(at))


def lowered_json(lowered: LoweredProgram, sizes: Mapping[str, int], roof: Roof) -> dict[str, Any]:
    """Plain data of the report."""
    found = rows(lowered, sizes, roof)
    return {
        "mode": lowered.lowered.mode,
        "at": dict(sizes),
        "roof": {"device": roof.name, "bytes_per_second": roof.bandwidth, "flops_per_second": roof.flops},
        "launches": sum(row.count for row in found),
        "rows": [{key: value for key, value in vars(row).items() if key != "source"} for row in found],
    }


def lowered_page(lowered: LoweredProgram, sizes: Mapping[str, int], roof: Roof, source: str | None = None) -> Page:
    """The report as a page; `source` names a kernel whose source is added."""
    found = rows(lowered, sizes, roof)
    page = Page()
    kernels = sum(row.count for row in found if row.source)
    calls = sum(row.count for row in found if not row.source)
    page.title(lowered.program.origin.name, f"{lowered.lowered.mode}: {kernels} kernels, {calls} library calls")
    page.row("at", ", ".join(f"{k}={v}" for k, v in sizes.items()))
    bound = roof.seconds(sum(r.moved for r in found), sum(r.computed for r in found))
    page.row("roofline", f"{roof.name}: at least {bound * 1e6:,.1f} us a call")
    for row in found:
        page.title(row.name, f"{row.count} x {' '.join(row.ops)}")
        page.row("moves", f"{row.moved:,.0f} bytes, {row.computed:,.0f} FLOPs, {row.share:.1%} of the roofline's time")
    if source is not None:
        for row in found:
            if row.source and row.name.startswith(source):
                page.title(row.name, "source")
                page.lines += [("", line, "") for line in row.source.splitlines()]
    return page
