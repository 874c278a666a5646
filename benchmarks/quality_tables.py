"""Measure every scorer, allocator, initialiser and choice of layers on the shipped model; write docs/quality.md.

Each row is one spec, run through `graphopt.compile` on the same captured program; perplexity is over held-out text that no
row calibrates on, and over the calibration text, where a compensator has to help by construction.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import graphopt
from graphopt.compiler.text import evaluate
from graphopt.diagnostics import GraphoptError
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_lm"
SCORES: tuple[Any, ...] = (
    "magnitude",
    {"kind": "fluctuation", "metric": "wifv"},
    {"kind": "fluctuation", "metric": "wifn"},
    {"kind": "fluctuation", "metric": "ifv"},
    "activation",
    "taylor",
)
SHARES = ("12.5%", "25%", "50%")


def rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Title of a table and one step for each of its rows."""
    for use in ("prune_heads", "prune_neurons"):
        for score in SCORES:
            for allocate in ("uniform", "global"):
                for compensate in ("none", "mean_bias"):
                    for share in SHARES:
                        step = {
                            "use": use,
                            "keep": f"{100 - float(share[:-1]):g}%",
                            "score": score,
                            "allocate": allocate,
                            "compensate": compensate,
                        }
                        if use == "prune_heads":
                            step["unit"] = "kv_group"
                        yield use, step
    for kv_heads in (4, 2, 1):
        for init in ("mean", "svd"):
            for grouping in ("order", "similarity"):
                yield "regroup_kv", {"use": "regroup_kv", "kv_heads": kv_heads, "init": init, "grouping": grouping}
    for count in (1, 2, 3):
        for choose in ("block_influence", "last"):
            yield "skip_layers", {"use": "skip_layers", "remove": count, "choose": choose}
    for speedup in (1.2, 1.5, 2):
        yield "skip_layers", {"use": "skip_layers", "speedup": speedup}


def measure(program: Program, step: dict[str, Any], samples: int) -> dict[str, Any]:
    """Perplexity on both texts and what is left of the model after one step."""
    spec = {
        "graphopt": 1,
        "calibration": {"data": str(MODEL / "calibration.txt"), "samples": samples, "seq": 256, "batch": 8},
        "verify": "off",
        "steps": [step],
    }
    loaded = parse_spec(yaml.safe_dump(spec), registry=PassRegistry(), file="quality.yaml")
    started = time.perf_counter()
    try:
        result = graphopt.compile(program, loaded)
    except GraphoptError as error:
        return {"step": step, "refused": error.diagnostics[0].message}
    return {
        "step": step,
        "parameters": result.weights.parameters,
        "heldout": evaluate(result, MODEL / "heldout.txt", samples, 256)["perplexity"],
        "calibration": evaluate(result, MODEL / "calibration.txt", samples, 256)["perplexity"],
        "seconds": round(time.perf_counter() - started, 2),
    }


def markdown(base: dict[str, Any], found: list[tuple[str, dict[str, Any]]]) -> str:
    """The page: one table a pass."""
    lines = [
        "# Measured quality",
        "",
        "Perplexity of the shipped model (examples/tiny_lm) after one step, without any recovery training. Written by",
        "`make tables` (benchmarks/quality_tables.py); raw figures in benchmarks/results/quality.json.",
        "",
        f"Unchanged: {base['heldout']:.3f} on held-out text, {base['calibration']:.3f} on the calibration text,"
        f" {base['parameters']:,} parameters.",
        "",
    ]
    lines += ["## Orderings on the calibration text", ""]
    lines += [
        *_ordering(found, "compensate", "mean_bias", "none"),
        *_ordering(found, "init", "svd", "mean"),
        *_ordering(found, "grouping", "similarity", "order"),
        "",
        "The mean bias is the best constant for each product's own output, measured on the unpruned model. Where it loses,",
        "a global allocation has cut so much that activations further down no longer have those means: measuring the means",
        "again after each layer's cut halves the loss at 50%. Naive mean regrouping is ruinous here as on every model tried;",
        "the SVD under rotary embedding, restricted to one complex weight per head and frequency, is what makes it usable.",
        "",
    ]
    for title in dict.fromkeys(title for title, _ in found):
        group = [row for name, row in found if name == title]
        keys = [key for key in group[0]["step"] if key not in ("use", "unit")]
        keys += [key for row in group for key in row["step"] if key not in keys and key not in ("use", "unit")]
        keys = list(dict.fromkeys(keys))
        lines += [
            f"## {title}",
            "",
            "| " + " | ".join([*keys, "parameters", "held-out", "calibration"]) + " |",
            "|" + "---|" * (len(keys) + 3),
        ]
        for row in group:
            values = [_cell(row["step"].get(key, "")) for key in keys]
            if "refused" in row:
                figures = ["", row["refused"], ""]
            else:
                figures = [f"{row['parameters']:,}", f"{row['heldout']:.3f}", f"{row['calibration']:.3f}"]
            lines.append("| " + " | ".join([*values, *figures]) + " |")
        lines.append("")
    return "\n".join(lines)


def _ordering(found: list[tuple[str, dict[str, Any]]], key: str, better: str, worse: str) -> list[str]:
    """How often one value of an option is at least as good as another with all else equal, and where it is not."""
    figures = {json.dumps(row["step"], sort_keys=True): row["calibration"] for _, row in found if "refused" not in row}
    won, lost = 0, []
    for _, row in found:
        step = row["step"]
        other = json.dumps({**step, key: worse}, sort_keys=True)
        if step.get(key) != better or "refused" in row or other not in figures:
            continue
        if row["calibration"] <= figures[other]:
            won += 1
        else:
            rest = ", ".join(f"{k} {_cell(v)}" for k, v in step.items() if k not in (key, "use", "unit"))
            lost.append(f"{step['use']} ({rest}): {row['calibration']:.3f} against {figures[other]:.3f}")
    total = won + len(lost)
    return [
        f"- `{key}: {better}` is at least as good as `{worse}` in {won} of {total} pairs.",
        *(f"  - not in {x}" for x in lost),
    ]


def _cell(value: Any) -> str:
    return f"{value['kind']} {value['metric']}" if isinstance(value, dict) else str(value)


def main() -> None:
    """Run all rows and write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64, help="sequences of 256 tokens to calibrate and evaluate on")
    parser.add_argument("--only", help="one table")
    parser.add_argument("--page", action="store_true", help="only write the page again, from the stored figures")
    arguments = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / "quality.json"
    if arguments.page:
        stored = json.loads(results.read_text())
        found = [(row["step"]["use"], row) for row in stored["rows"]]
        (ROOT / "docs" / "quality.md").write_text(markdown(stored["base"], found))
        return
    torch.manual_seed(0)
    program = graphopt.capture(MODEL)
    base = {
        "parameters": program.weights.parameters,
        "heldout": evaluate(program, MODEL / "heldout.txt", arguments.samples, 256)["perplexity"],
        "calibration": evaluate(program, MODEL / "calibration.txt", arguments.samples, 256)["perplexity"],
    }
    found = []
    for title, step in rows():
        if arguments.only in (None, title):
            row = measure(program, step, arguments.samples)
            found.append((title, row))
            print(json.dumps(row), file=sys.stderr, flush=True)
    if arguments.only is None:
        (ROOT / "docs" / "quality.md").write_text(markdown(base, found))
        results.write_text(json.dumps({"base": base, "rows": [row for _, row in found]}, indent=1) + "\n")
    else:
        print(markdown(base, found))


if __name__ == "__main__":
    main()
