"""Reports of lowered programs: for each kernel its ops, what it moves and computes, and its share of the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from graphopt.backends.report import CallReport, GroupReport
from graphopt.backends.running import LoweredProgram
from graphopt.diagnostics import PlanError, did_you_mean
from graphopt.report.page import Page


@dataclass(frozen=True)
class Roof:
    """What bounds a device: bytes a second to and from its memory and FLOP a second of bf16 products that are dense.

    `source` says whether these are rates that a copy and a product reach, or those of the data sheet, which nothing reaches.
    """

    name: str
    bandwidth: float
    flops: float
    source: str

    def seconds(self, moved: float, computed: float) -> float:
        """The least time for so many bytes and FLOPs."""
        return max(moved / self.bandwidth, computed / self.flops)

    def bound(self, moved: float, computed: float) -> str:
        """What that time goes by: "bytes" or "flops"."""
        return "bytes" if moved / self.bandwidth >= computed / self.flops else "flops"


# Data sheets: NVIDIA A100 80GB SXM, NVIDIA H100 SXM, an eighth of NVIDIA DGX B200, AMD Instinct MI300X.
ROOFS = {
    roof.name: roof
    for roof in (
        Roof("a100", 2.039e12, 312e12, "data sheet"),
        Roof("h100", 3.35e12, 989e12, "data sheet"),
        Roof("h200", 4.3e12, 790e12, "reached"),
        Roof("b200", 8e12, 2250e12, "data sheet"),
        Roof("mi300x", 5.3e12, 1307e12, "data sheet"),
    )
}


def roof_of(name: str) -> Roof:
    """The roof of a device; raises PlanError for one that is not known."""
    if name not in ROOFS:
        known = ", ".join(ROOFS)
        raise PlanError.of(
            "unknown_device",
            f"there is no roofline of {name!r}",
            help=did_you_mean(name, list(ROOFS)) or (f"the devices are {known}",),
        )
    return ROOFS[name]


@dataclass(frozen=True)
class Row:
    """One kernel or library call with how often it runs; bytes, FLOPs and the least time are those of all its runs.

    `kernel` is the template that it is written by, None for a library call; `bound` says what the device would wait for.
    """

    name: str
    kernel: str | None
    count: int
    ops: tuple[str, ...]
    moved: float
    computed: float
    seconds: float
    bound: str
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
    made = []
    for name, found in groups.items():
        (moved, computed), first = numbers[name], found[0]
        kernel = first.kernel if isinstance(first, GroupReport) else None
        made.append(
            Row(
                name=name,
                kernel=kernel.template if kernel else None,
                count=len(found),
                ops=first.ops,
                moved=moved,
                computed=computed,
                seconds=times[name],
                bound=roof.bound(moved, computed),
                share=times[name] / total,
                source=kernel.source if kernel else None,
            )
        )
    return sorted(made, key=lambda row: -row.share)


def _shown(found: list[Row], source: str | None) -> list[Row]:
    """The kernels whose source is asked for: by a name's beginning, or all; raises PlanError when there is none."""
    written = [row for row in found if row.source]
    if source is None:
        return []
    chosen = [row for row in written if source == "all" or row.name.startswith(source)]
    if not chosen:
        names = [row.name for row in written]
        raise PlanError.of(
            "unknown_kernel",
            f"no kernel's name begins with {source!r}",
            notes=(f"the kernels are {', '.join(names) or 'none: all are library calls'}",),
            help=did_you_mean(source, names) or ("say all for every source",),
        )
    return chosen


def _number(expr: sympy.Expr, at: Mapping[sympy.Symbol, int]) -> float:
    return float(sympy.sympify(expr).subs(at))


def lowered_json(
    lowered: LoweredProgram, sizes: Mapping[str, int], roof: Roof, source: str | None = None
) -> dict[str, Any]:
    """Plain data of the report; `source` adds the sources of the kernels whose names begin so, or of all."""
    found = rows(lowered, sizes, roof)
    shown = {row.name: row.source for row in _shown(found, source)}
    return {
        "mode": lowered.lowered.mode,
        "at": dict(sizes),
        "roof": {
            "device": roof.name,
            "bytes_per_second": roof.bandwidth,
            "flops_per_second": roof.flops,
            "source": roof.source,
        },
        "launches": sum(row.count for row in found),
        "rows": [{key: value for key, value in vars(row).items() if key != "source"} for row in found],
        **({"sources": shown} if shown else {}),
    }


def lowered_page(lowered: LoweredProgram, sizes: Mapping[str, int], roof: Roof, source: str | None = None) -> Page:
    """The report as a page; `source` begins the names of kernels whose sources are added, or is "all"."""
    found = rows(lowered, sizes, roof)
    page = Page()
    kernels = sum(row.count for row in found if row.source)
    calls = sum(row.count for row in found if not row.source)
    page.title(lowered.program.origin.name, f"{lowered.lowered.mode}: {kernels} kernels, {calls} library calls")
    page.row("at", ", ".join(f"{k}={v}" for k, v in sizes.items()))
    bound = roof.seconds(sum(r.moved for r in found), sum(r.computed for r in found))
    words = "that are reached" if roof.source == "reached" else "of its data sheet"
    page.row("roofline", f"{roof.name}, by rates {words}: at least {bound * 1e6:,.1f} us a call")
    for row in found:
        page.title(row.name, f"{row.count} x {' '.join(row.ops)}")
        page.row("kernel", row.kernel or "library call")
        page.row("moves", f"{row.moved:,.0f} bytes, {row.computed:,.0f} FLOPs")
        page.row("least", f"{row.seconds * 1e6:,.1f} us by {row.bound}, {row.share:.1%} of the roofline's time")
    for row in _shown(found, source):
        page.title(row.name, "source")
        page.lines += [("", line, "") for line in (row.source or "").splitlines()]
    return page
