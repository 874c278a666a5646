"""The page of the coverage benchmark: totals and one line a class, in Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

CAPTURE = Path(__file__).resolve().parent / "results" / "capture.json"
PARTS = ("blocks", "attentions", "feed_forwards")


def views_right(row: dict[str, Any]) -> bool:
    """Whether blocks, attentions and dense feed-forwards found are as many as the module tree holds."""
    found, exist = row.get("found"), row.get("exist")
    return bool(found) and bool(exist) and all(found[part] == exist[part] for part in PARTS)


def page(results: dict[str, dict[str, dict[str, Any]]], surgeries: list[str], layers: int) -> str:
    """The whole page: a section for every auto class that has results."""
    lines = [
        "# Coverage of transformers",
        "",
        f"Written by `benchmarks/coverage.py` with transformers {transformers.__version__}, torch {torch.__version__}.",
        "Every class is built small from generic recipes, captured, compared with eager at a shape that was not captured",
        "(`equal`), saved by transformers and captured from disk (`disk`), viewed, and cut; a cut is `ok` when it equals",
        "its emulation in float64 and survives saving and loading. Parts are `found/exist`, and what exists is counted",
        f"from the module tree during one eager run ({layers} layers a stack where the config can say so).",
        "Eager means transformers with its sdpa attention; where that drops a mask of ones, its spelled-out attention.",
        "A layer is what mixes tokens and what feeds forward after it, also where a class lists them as two (`nemotron_h`);",
        "layers whose result the model does not read do not count (the last character layer of `canine` that classifies).",
        "Of the tasks other than causal language modelling, the table holds the classes that were run: at least those that",
        "`benchmarks/small_models.py` names as representatives (`--selected`); without that option the command runs all.",
        "",
    ]
    for auto, rows in results.items():
        lines += _section(auto, rows, surgeries)
    if CAPTURE.is_file():
        lines += _capture_time(json.loads(CAPTURE.read_text()))
    return "\n".join(lines)


def _capture_time(figures: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "## time of a capture",
        "",
        "A Llama shape with hidden size 4096 without weights, by `benchmarks/capture.py`: CPU seconds of one thread, beside",
        "plain `torch.export` of the same module in the same run; the goal is a ratio of at most 1.1.",
        "",
        "| layers | plain torch.export | capture | ratio | nodes | where it goes |",
        "|---|---|---|---|---|---|",
    ]
    for layers, row in sorted(figures.items(), key=lambda item: int(item[0])):
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["stages"].items() if seconds >= 0.1)
        first = f"| {layers} | {row['plain export']:.2f} | {row['capture']:.2f} | {row['ratio']:.2f} "
        lines.append(f"{first}| {row['nodes']} | {stages} |")
    return [*lines, ""]


def _section(auto: str, rows: dict[str, dict[str, Any]], surgeries: list[str]) -> list[str]:
    built = [r for r in rows.values() if r.get("builds") == "ok"]
    captured = [r for r in built if r.get("captures") == "ok"]
    equal = [r for r in captured if r["equal"] == "ok"]
    seen = [r for r in equal if views_right(r)]
    disk = [r for r in captured if r["disk"] == "ok"]
    cut = [r for r in seen if all(a.startswith(("ok", "declined")) for a in r.get("surgeries", {}).values())]
    lines = [
        f"## {auto.replace('_', ' ')}",
        "",
        f"{len(rows)} classes tried; {len(built)} build from a generic recipe; {len(captured)} are captured;"
        f" {len(equal)} equal eager; {len(disk)} are captured from disk and equal eager; {len(seen)} are equal and have"
        f" all blocks, attentions and dense feed-forwards in view; {len(cut)} of those pass or decline with a reason"
        " every cut.",
        "",
        *(
            f"- {name}: {sum(1 for r in captured if r.get('surgeries', {}).get(name) == 'ok')} ok,"
            f" {sum(1 for r in captured if r.get('surgeries', {}).get(name, '').startswith('declined'))} declined,"
            f" {sum(1 for r in captured if not r.get('surgeries', {}).get(name, 'ok').startswith(('ok', 'declined')))}"
            " neither"
            for name in surgeries
        ),
        "",
        "| model type | captured | equal | disk | blocks, attentions, feed-forwards | " + " | ".join(surgeries) + " |",
        "|---|---|---|---|---|" + "---|" * len(surgeries),
    ]
    for name, row in sorted(rows.items()):
        empty = " |" * (3 + len(surgeries))
        if row.get("builds") != "ok":
            lines.append(f"| {name} | {_cell('not built: ' + row.get('builds', row.get('error', '')))} |{empty}")
        elif row.get("captures") != "ok":
            lines.append(f"| {name} | {_cell(row.get('captures', row.get('error', '')))} |{empty}")
        else:
            counts = ", ".join(f"{row['found'][part]}/{row['exist'][part]}" for part in PARTS)
            if row["found"]["unseen"] and not views_right(row):
                counts += ": " + _cell(row["found"]["unseen"][0])
            cells = [_cell(row.get("surgeries", {}).get(surgery, "")) for surgery in surgeries]
            captured_as = "ok" + (f", {row['dims']}" if row.get("dims") else "")
            first = f"| {name} | {captured_as} | {_cell(row['equal'])} | {_cell(row['disk'])} | {counts} | "
            lines.append(first + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:110]
