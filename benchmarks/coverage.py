"""How much of transformers the front end and the views cover: build, capture, compare, view and cut every causal LM class.

    python benchmarks/coverage.py            # resumable: a class that has a result is not run again
    python benchmarks/coverage.py --only llama gpt2

Each class is built small from one generic recipe (no table per model). The attentions and feed-forwards that exist are
counted independently, from the module tree, here and nowhere else. Figures: benchmarks/results/coverage.json and
docs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import graphopt
from graphopt.compiler.verify import random_inputs, tolerance
from graphopt.diagnostics import GraphoptError
from graphopt.frontend import capture_model
from graphopt.ir.program import Program
from graphopt.passkit import Context, Pass, PassRegistry
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.views import Views

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
SECONDS = 240
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SURGERIES: dict[str, dict[str, Any]] = {
    # Of grouped heads the same number leaves every group: one a group there, one in all where every head has its own.
    "one head fewer": {
        "use": "prune_heads",
        "unit": "query",
        "keep": "max(heads - kv_heads, floor(kv_heads / heads) * (heads - 1))",
    },
    "a quarter of the neurons": {"use": "prune_neurons", "keep": "floor(0.75 * neurons)"},
    "one layer fewer": {"use": "skip_layers", "layers": 1},
    "half the KV heads": {"use": "regroup_kv", "kv_heads": "ceil(kv_heads / 2)"},
}


class OutOfTimeError(Exception):
    """A class took longer than its share."""


def small_config(model_type: str) -> Any:
    """The config class's own defaults with every size it has a name for made small."""
    cls = transformers.CONFIG_MAPPING[model_type]
    defaults = cls()
    known = defaults.to_dict()
    values = {}
    for name, value in SMALL.items():
        own = defaults.attribute_map.get(name, name)
        if own in known or name in known:
            values[own if own in known else name] = value
    if isinstance(known.get("layer_types"), list):
        values["layer_types"] = (known["layer_types"] * SMALL["num_hidden_layers"])[: SMALL["num_hidden_layers"]]
    return cls(**values)


def count_modules(model: Any) -> dict[str, int]:
    """Attentions and feed-forwards by the module tree: modules whose class name says so and that hold no other such."""

    def innermost(words: tuple[str, ...]) -> int:
        found = [n for n, m in model.named_modules() if any(w in type(m).__name__.lower() for w in words)]
        return sum(1 for n in found if not any(o != n and o.startswith(n + ".") for o in found))

    return {"attentions": innermost(("attention", "attn")), "feed_forwards": innermost(("mlp", "feedforward", "ffn"))}


def run_class(model_type: str) -> dict[str, Any]:
    """All checks of one class; every entry is a figure, `ok`, or the reason why not."""
    row: dict[str, Any] = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    torch.manual_seed(0)
    try:
        config = small_config(model_type)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    except OutOfTimeError:
        raise
    except Exception as error:
        return {**row, "builds": _short(error)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    row |= {"builds": "ok", "exist": count_modules(model)}
    started = time.perf_counter()
    try:
        program = capture_model(model)
    except GraphoptError as error:
        return {**row, "captures": _short(error)}
    row |= {"captures": "ok", "seconds": round(time.perf_counter() - started, 2), "equal": _equal(model, program)}
    views = Views(program)
    row["found"] = {
        "blocks": len(views.blocks),
        "attentions": len(views.attentions),
        "feed_forwards": len(views.feed_forwards),
        "unseen": [f"{u.what}: {u.reason}" for u in views.unseen][:4],
    }
    row["surgeries"] = {name: _surgery(program, step) for name, step in SURGERIES.items()}
    return row


def _equal(model: Any, program: Program) -> str:
    inputs = random_inputs(program, {"B": 2, "S": 37}, 1)
    inputs = {k: torch.ones_like(v) if k == "attention_mask" else v for k, v in inputs.items()}
    if "position_ids" in inputs:
        inputs["position_ids"] = torch.arange(37).expand(2, -1)
    try:
        with torch.no_grad():
            expected = model(**inputs).logits
            got = program.module()(**inputs)[program.entry.outputs.index("logits")]
    except OutOfTimeError:
        raise
    except Exception as error:
        return _short(error)
    error = float((got - expected).abs().max() / expected.abs().max())
    return "ok" if error < 1e-4 else f"differs by {error:.2g}"


def _surgery(program: Program, step: dict[str, Any]) -> str:
    views = Views(program)
    config: Pass = (
        PassRegistry().get(step["use"]).model_validate_json(json.dumps({k: v for k, v in step.items() if k != "use"}))
    )
    try:
        plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
        if not plan.edits:
            return "declined: " + "; ".join(sorted({d.reason for d in plan.declines}))[:160]
        after, reference = apply_edits(program, views, plan.edits), emulate_edits(program, views, plan.edits)
        inputs = random_inputs(program, {"B": 2, "S": 11}, 2)
        with torch.no_grad():
            got, expected = (p.module(torch.float64)(**inputs)[0] for p in (after, reference))
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
        error = float((got[real] - expected[real]).abs().max() / expected[real].abs().max())
        if not error <= tolerance(torch.float64, 4096):
            return f"differs from its emulation by {error:.2g}"
        with tempfile.TemporaryDirectory() as directory:
            graphopt.save(after, Path(directory) / "out", format="graphopt")
            again = graphopt.load(Path(directory) / "out").module()(**inputs)[0]
            if not torch.equal(again[real], after.module()(**inputs)[0][real]):
                return "changes when it is saved and loaded"
    except GraphoptError as error:
        return f"refused: {error.diagnostics[0].message}"[:200]
    except OutOfTimeError:
        raise
    except Exception as error:
        return "FAILED: " + _short(error)
    return "ok"


def _short(error: BaseException) -> str:
    if isinstance(error, GraphoptError):
        return error.diagnostics[0].message[:200]
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:140]} ({Path(last.filename).name}:{last.lineno})"


def page(rows: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown, with totals first."""
    built = [r for r in rows.values() if r.get("builds") == "ok"]
    captured = [r for r in built if r.get("captures") == "ok"]
    equal = [r for r in captured if r["equal"] == "ok"]
    seen = [r for r in equal if r["found"]["blocks"] and not r["found"]["unseen"]]
    lines = [
        "# Coverage of causal language models",
        "",
        f"Written by benchmarks/coverage.py with transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        f"{len(rows)} classes tried; {len(built)} build from the generic small recipe, {len(captured)} are captured,",
        f"{len(equal)} equal eager at a second shape, {len(seen)} of those have all blocks and attentions in view.",
        *(
            f"{name}: {sum(1 for r in captured if r['surgeries'][name] == 'ok')} ok,"
            f" {sum(1 for r in captured if r['surgeries'][name].startswith(('declined', 'refused')))} declined;"
            for name in SURGERIES
        ),
        "every other answer stands in the table.",
        "",
        "| model type | captured | equal | blocks, attentions, feed-forwards | " + " | ".join(SURGERIES) + " |",
        "|---|---|---|---|" + "---|" * len(SURGERIES),
    ]
    for name, row in sorted(rows.items()):
        if row.get("builds") != "ok":
            lines.append(f"| {name} | not built: {_cell(row.get('builds', row.get('error', '')))} | | |" + " |" * 4)
        elif row.get("captures") != "ok":
            lines.append(f"| {name} | {_cell(row.get('captures', row.get('error', '')))} | | |" + " |" * 4)
        else:
            found = row["found"]
            counts = f"{found['blocks']}, {found['attentions']}, {found['feed_forwards']}"
            cells = [_cell(row["surgeries"][surgery]) for surgery in SURGERIES]
            lines.append(f"| {name} | ok | {_cell(row['equal'])} | {counts} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:110]


def main() -> None:
    """Run what has no result yet, saving after every class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="model types; runs them again")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop starting classes after this long")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)

    def expire(signum: int, frame: Any) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, expire)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    began = time.monotonic()
    for model_type in arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if (model_type in rows and not arguments.only) or time.monotonic() - began > 60 * arguments.minutes:
            continue
        signal.alarm(SECONDS)
        try:
            rows[model_type] = run_class(model_type)
        except OutOfTimeError:
            rows[model_type] = {"error": f"took more than {SECONDS} s"}
        except Exception as error:
            rows[model_type] = {"error": _short(error)}
        finally:
            signal.alarm(0)
        print(model_type, json.dumps(rows[model_type]), file=sys.stderr, flush=True)
        beside = RESULTS.with_suffix(".tmp")
        beside.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        beside.replace(RESULTS)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
