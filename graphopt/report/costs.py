"""The page of `cost`: totals as formulae and numbers, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.cost import Cost, Part, formula
from graphopt.report.page import Page, fold, size


def cost_page(name: str, found: Cost, sizes: Mapping[str, int]) -> Page:
    """A page of a program's costs, as formulae and at given dimension sizes."""
    numbers = found.at(**sizes)
    page = Page()
    page.title(name, "at " + ", ".join(f"{dim}={value:,}" for dim, value in sizes.items()))
    page.row("parameters", f"{found.parameters:,}")
    page.row("bytes", f"{found.bytes:,}  ({size(found.bytes)})")
    page.row("FLOPs", f"{numbers['flops']:,}  = {formula(found.flops)}")
    page.row("KV bytes", f"{numbers['kv_bytes']:,}  ({size(numbers['kv_bytes'])})  = {formula(found.kv_bytes)}")
    page.row("KV a token", f"{found.kv_bytes_per_token:,} bytes")
    for op, count in found.uncounted.items():
        page.row("uncounted", f"{count} x {op}: its FLOPs are not known and count zero", style="yellow")
    for note in found.notes:
        page.row("note", note, style="yellow")
    page.title("parts")
    parts = [*found.breakdown.outside, *(view for views in found.breakdown.views for view in views)]
    groups: dict[tuple[object, ...], list[Part]] = {}
    for part in parts:
        key = (part.kind, part.parameters, part.flops, part.kv_bytes, part.path.count("."))
        groups.setdefault(key, []).append(part)
    for members in groups.values():
        first = members[0]
        for path in fold(part.path for part in members):
            each = ", each" if "{" in path else ""
            words = [f"{first.parameters:,} parameters{each}"]
            words += [f"FLOPs {formula(first.flops)}"] if first.flops != 0 else []
            words += [f"KV bytes {formula(first.kv_bytes)}"] if first.kv_bytes != 0 else []
            page.row(path + (" (rest)" if first.kind == "other" else ""), "; ".join(words))
    return page
