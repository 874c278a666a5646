"""The summary of a run, from a program's trail: what every step changed, proved and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graphopt.ir.program import Applied, Program
from graphopt.report.page import change, size

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = {
    "parameters": "parameters",
    "flops": "FLOPs",
    "kv_bytes": "KV bytes",
    "bytes": "bytes",
    "perplexity": "perplexity",
}


def run_report(program: Program) -> dict[str, Any]:
    """The trail as data: figures before the first and after each step, with edits, declines and certificate."""
    trail = program.trail
    rows: list[dict[str, Any]] = []
    if trail:
        rows.append({"step": "original", "figures": _figures(trail[0].before)})
    for applied in trail:
        rows.append(
            {
                "step": applied.step,
                "place": applied.place,
                "effect": applied.effect,
                "edits": len(applied.edits),
                "declines": [dict(decline) for decline in applied.declines],
                "certificate": dict(applied.certificate),
                "seconds": applied.seconds,
                "figures": _figures(applied.after),
            }
        )
    return {"name": program.origin.name, "at": _at(trail), "rows": rows}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    heads, rows = _table(report)
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] + ["---:"] * (len(heads) - 2) + ["---"]) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n" + _foot(report)


def plain(report: Mapping[str, Any]) -> str:
    """The report as aligned columns."""
    heads, rows = _table(report)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    last = len(heads) - 1

    def line(cells: list[str]) -> str:
        made = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(made).rstrip()

    return "\n".join([line(heads), *map(line, rows)]) + "\n" + _foot(report)


def rich(report: Mapping[str, Any]) -> Table:
    """The report as a table for terminals."""
    from rich.table import Table

    heads, rows = _table(report)
    table = Table(title=str(report["name"]), caption=_foot(report).strip() or None)
    for i, head in enumerate(heads):
        left = i in (0, len(heads) - 1)
        table.add_column(head, justify="left" if left else "right", style="cyan" if i == 0 else None)
    for row in rows:
        table.add_row(*row)
    return table


def proof(certificate: Mapping[str, Any]) -> str:
    """A certificate in a few words."""
    level = certificate.get("level")
    if level == "full" and "largest_relative_error" in certificate:
        error, allowed = float(certificate["largest_relative_error"]), float(certificate["tolerance"])
        return f"equals the {certificate.get('reference', 'reference')} within {error:.1e} (allowed {allowed:.1e})"
    if level == "sampled":
        blocks = certificate["blocks"]
        on = f"on {len(blocks)} of {certificate['of_blocks']} blocks" if isinstance(blocks, list) else "on all blocks"
        return f"equals the {certificate['reference']} {on} within {float(certificate['largest_relative_error']):.1e}"
    return {"shapes": "shapes checked", "off": "not verified"}.get(str(level), str(level or "no certificate"))


def figure(name: str, value: Any) -> str:
    """One figure for people: bytes in binary units, counts grouped, perplexities with three decimals."""
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if name.endswith("bytes"):
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = report["rows"]
    used = [name for name in COLUMNS if any(name in row["figures"] for row in rows)]
    heads = ["step", *(COLUMNS[name] for name in used), "edits", "declined", "certificate"]
    made = []
    for number, row in enumerate(rows):
        cells = [str(row["step"])]
        for name in used:
            value = row["figures"].get(name)
            first = rows[0]["figures"].get(name)
            more = change(first, value) if number and isinstance(value, int | float) and first is not None else ""
            cells.append(figure(name, value) + (f" ({more})" if more else ""))
        if "edits" in row:
            cells += [str(row["edits"]), str(len(row["declines"])), proof(row["certificate"])]
        made.append(cells + [""] * (len(heads) - len(cells)))
    return heads, made


def _foot(report: Mapping[str, Any]) -> str:
    at = report["at"]
    return "FLOPs and KV bytes at " + ", ".join(f"{name}={value:,}" for name, value in at.items()) + "\n" if at else ""


def _at(trail: tuple[Applied, ...]) -> dict[str, int]:
    return dict(trail[0].before.get("at", {})) if trail else {}


def _figures(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recorded.items() if key != "at"}
