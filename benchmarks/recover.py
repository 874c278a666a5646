"""What recovery training gives back after surgery on the shipped model: benchmarks/results/recover.json, docs/recovery.md.

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
PAGE = ROOT / "docs" / "recovery.md"
RECIPE = {"batch": 2, "seq": 128, "rate": 1e-3, "warmup": 20}
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


HEAD = """# Recovery after surgery, measured

`recover` is a step that trains: the transformed program learns again what an earlier one did. Perplexity of the shipped
model (examples/tiny_lm) on held-out text that nothing trains on, before surgery, after it, and after 200 and 1000 steps of
recovery, each from the same start with a schedule of its own. Written by `python benchmarks/recover.py`; raw figures in
benchmarks/results/recover.json.
"""
TAIL = """
The teacher is the original model and the loss the KL divergence of its next-token distribution; every weight is trained,
in float32, and rounded to the model's bfloat16 once at the end. The text is the calibration text of the model.

## In a spec

```yaml
steps:
  - use: regroup_kv
    kv_heads: heads / 4
    init: mean
  - use: recover
    teacher: original            # or the id of an earlier step
    weights: all                 # or: changed, those that surgery touched
    loss: {logits: {temperature: 1.0}, hidden: {weight: 1.0}, next_token: 0.1}
    lora: {rank: 16}             # train low-rank changes, merged at the end; left out: the weights themselves
    recipe: {steps: 200, batch: 4, seq: 128, rate: 1e-3, warmup: 20, accumulate: 2}
```

`graphopt plan` says what would be trained and trains nothing. The trail keeps the losses of the first and the last tenth of
the steps, the tokens and the seconds. The order of the text is a function of the seed and of the step, so that the same
spec gives the same weights; `graphopt.compile(..., state=DIR)` saves the state of a run every 100 steps and goes on from
there bit for bit. The loop is graphopt/train/loop.py: loss terms, trained weights and schedule are its only choices, and
every method that trains uses it.
"""


def page(stored: dict[str, Any]) -> str:
    """docs/recovery.md."""
    recipe = ", ".join(f"{name} {value}" for name, value in stored["recipe"].items())
    rows = stored["rows"]
    lines = [
        HEAD,
        "| surgery | parameters | before | after surgery | 200 steps | 1000 steps |",
        "|---|---|---|---|---|---|",
    ]
    for each in rows:
        figures = [each.get(key) for key in ("before", "after_surgery", "after_200", "after_1000")]
        lines.append(
            f"| {each['surgery']} | {each['parameters_before']:,} to {each['parameters']:,} | "
            + " | ".join("not run" if value is None else f"{value:.2f}" for value in figures)
            + " |"
        )
    lines.append(f"\nRecipe: {recipe}.{TAIL}")
    return "\n".join(lines)


def write(found: dict[str, Any]) -> None:
    """Put a row among those that are stored, and write the page."""
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {each["surgery"]: each for each in stored}
    rows[found["surgery"]] = rows.get(found["surgery"], {}) | found
    together = {"recipe": RECIPE, "rows": [rows[name] for name in SURGERY if name in rows]}
    RESULTS.write_text(json.dumps(together, indent=1) + "\n")
    PAGE.write_text(page(together))


def main() -> None:
    """Run the rows that are asked for and write them beside those that were not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one row, by its name")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--dry", action="store_true", help="print and write nothing")
    parser.add_argument("--page", action="store_true", help="only write the page again, from the stored figures")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return
    torch.set_num_threads(1)
    program = graphopt.capture(MODEL)
    for name in SURGERY:
        if arguments.only in (None, name):
            found = row(program, name, tuple(arguments.steps))
            print(json.dumps(found), file=sys.stderr, flush=True)
            if not arguments.dry:
                write(found)


if __name__ == "__main__":
    main()
