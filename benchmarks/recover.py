"""What recovery training gives back after surgery on the shipped model: benchmarks/results/recover.json.

Each row is a spec of one surgical step and one `recover` step; perplexity is over held-out text that nothing trains on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import graphopt
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_lm"
RESULTS = ROOT / "benchmarks" / "results" / "recover.json"
STEPS = (200, 1000)
RECIPE = {"batch": 4, "seq": 128, "rate": 1e-3, "warmup": 20}
SURGERY: dict[str, dict[str, Any]] = {
    "KV heads 8 to 2, mean": {"use": "regroup_kv", "kv_heads": 2, "init": "mean"},
    "KV heads 8 to 2, SVD": {"use": "regroup_kv", "kv_heads": 2, "init": "svd", "grouping": "similarity"},
    "heads at 50%": {
        "use": "prune_heads",
        "unit": "kv_group",
        "keep": "50%",
        "score": "activation",
        "compensate": "mean_bias",
    },
    "neurons at 50%": {"use": "prune_neurons", "keep": "50%", "score": "activation", "compensate": "mean_bias"},
}


def run(program: Program, steps: list[dict[str, Any]]) -> Program:
    """The program after the steps of a spec on the shipped texts."""
    spec = {
        "graphopt": 1,
        "calibration": {"data": str(MODEL / "calibration.txt"), "samples": 64, "seq": 256, "batch": 8},
        "evaluation": {"data": str(MODEL / "heldout.txt"), "samples": 64, "seq": 256},
        "steps": steps,
    }
    return graphopt.compile(program, parse_spec(yaml.safe_dump(spec), registry=PassRegistry(), file="recover.yaml"))


def row(program: Program, name: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """Perplexity of one surgery, before and after each length of training."""
    found: dict[str, Any] = {"surgery": name, "step": SURGERY[name]}
    for count in steps:
        recover = {"use": "recover", "loss": {"logits": {}}, "recipe": {**RECIPE, "steps": count}}
        started = time.perf_counter()
        cut, trained = run(program, [SURGERY[name], recover]).trail[-2:]
        found |= {"before": cut.before["perplexity"], "after_surgery": cut.after["perplexity"]}
        found |= {"parameters_before": cut.before["parameters"], "parameters": cut.after["parameters"]}
        found[f"after_{count}"] = trained.after["perplexity"]
        found[f"training_{count}"] = trained.certificate["training"]
        found[f"seconds_{count}"] = round(time.perf_counter() - started, 1)
    return found


def main() -> None:
    """Run the rows that are asked for and write them beside those that were not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one row, by its name")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--dry", action="store_true", help="print and write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    program = graphopt.capture(MODEL)
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {each["surgery"]: each for each in stored}
    for name in SURGERY:
        if arguments.only in (None, name):
            found = row(program, name, tuple(arguments.steps))
            rows[name] = rows.get(name, {}) | found
            print(json.dumps(found), file=sys.stderr, flush=True)
            if not arguments.dry:
                ordered = [rows[each] for each in SURGERY if each in rows]
                RESULTS.write_text(json.dumps({"recipe": RECIPE, "rows": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
