"""How much of transformers the front end and the views cover: build, capture, compare, view, cut, save and load every class.

    python benchmarks/coverage.py                          # causal LMs; resumable: a class with a result is not run again
    python benchmarks/coverage.py --auto all --selected    # of every other task the classes named in small_models.SELECTED
    python benchmarks/coverage.py --auto all               # every class of every auto class (hours)
    python benchmarks/coverage.py --only llama gpt2        # these again
    python benchmarks/coverage.py --only llama --results mine.json   # these, beside the stored results

Every class runs in a forked child of its own, so that transformers is imported once and a class that hangs is ended. The
models are built by small_models.py; model_parts.py counts, from the module tree, what the views should find. Figures:
benchmarks/results/coverage.json; table: docs/coverage.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from coverage_page import page
from model_parts import count_parts
from small_models import (
    AUTOS,
    LAYERS,
    SELECTED,
    NotBuiltError,
    build,
    ended,
    model_types,
    run,
    sample_inputs,
)

import graphopt
from graphopt.compiler.verify import random_inputs, tolerance
from graphopt.diagnostics import GraphoptError
from graphopt.frontend import capture_model, capture_pretrained
from graphopt.ir.program import Program
from graphopt.passkit import Context, Pass, PassRegistry
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.views import Views
from graphopt.views.kinds import Block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
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


def run_class(auto: str, model_type: str, surgeries: bool = True) -> dict[str, Any]:
    """All checks of one class; every entry is a figure, `ok`, or the reason why not."""
    row: dict[str, Any] = {"class": str(model_types(auto)[model_type])}
    try:
        model, recipe = build(auto, model_type)
    except NotBuiltError as error:
        return {**row, "builds": str(error)[:300]}
    row |= {"builds": "ok", "recipe": recipe, "exist": count_parts(model, sample_inputs(model))}
    with tempfile.TemporaryDirectory() as directory:
        try:
            program, row["seconds"], row["disk"] = _capture(model, directory)
        except GraphoptError as error:
            return {**row, "captures": _short(error)}
        row |= {"captures": "ok", "dims": _fixed(program), "equal": _equal(model, program)}
        if "differs" in row["equal"]:
            # transformers' sdpa leaves out a mask of ones, and causality with it where a module does not claim any.
            model.set_attn_implementation("eager")
            row |= {"equal": _equal(model, program), "compared_with": "eager attention"}
        if any(spec.role == "pictures" for spec in program.entry.inputs):
            inputs = random_inputs(program, _sizes(program, {"B": 2, "S": 19}), 3)
            inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
            row["exist"] = count_parts(model, inputs)
        return row | _views_and_cuts(program, surgeries)


def _capture(model: Any, directory: str) -> tuple[Program, float, str]:
    """The model saved as transformers does and captured from there; where that fails, captured from memory."""
    reason = "ok"
    try:
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(directory)
        started = time.perf_counter()
        return capture_pretrained(directory), round(time.perf_counter() - started, 2), reason
    except Exception as error:
        if isinstance(error, GraphoptError) and error.diagnostics[0].code == "not_exportable":
            raise
        reason = _short(error)
    started = time.perf_counter()
    return capture_model(model), round(time.perf_counter() - started, 2), reason


def _views_and_cuts(program: Program, surgeries: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    views = Views(program)
    # Residual blocks of convolutions alone are cut as layers are, but the module tree does not tell them apart.
    layers = [b for b in views.blocks if b.attentions or not _convolutional(b)]
    row["found"] = {
        "blocks": len(layers),
        "attentions": len(views.attentions),
        "feed_forwards": sum(len(block.feed_forwards) for block in views.blocks),
        "unseen": [f"{u.what}: {u.reason}" for u in views.unseen][:6],
    }
    if surgeries:
        row["surgeries"] = {name: _surgery(program, step) for name, step in SURGERIES.items()}
    return row


def _convolutional(block: Block) -> bool:
    products = any("linear" in str(node.target) or "mm" in str(node.target) for node in block.nodes)
    return not products and all(mixer.kind == "convolution" for mixer in block.mixers)


def _fixed(program: Program) -> str:
    """The dimensions that are narrower than asked for."""
    return ", ".join(f"{dim.name} in [{dim.low}, {dim.high}]" for dim in program.dims if dim.low > 1 or dim.high < 4096)


def _sizes(program: Program, wanted: dict[str, int]) -> dict[str, int]:
    """`wanted` sizes, moved into the ranges that the program allows."""
    return {dim.name: min(max(wanted.get(dim.name, dim.hint), dim.low), dim.high) for dim in program.dims}


def _equal(model: Any, program: Program) -> str:
    """Compare with eager at a shape that was not captured, without padding and, at the real tokens, with."""
    for padded in (False, True):
        inputs = random_inputs(program, _sizes(program, {"B": 2, "S": 37}), 1)
        inputs |= {s.name: ended(model, inputs[s.name]) for s in program.entry.inputs if s.role == "tokens"}
        real: Any = ...
        if not padded:
            for spec in program.entry.inputs:
                if spec.role == "padding":
                    inputs[spec.name] = torch.ones_like(inputs[spec.name])
                elif spec.role == "positions":
                    inputs[spec.name] = torch.arange(inputs[spec.name].shape[1]).expand_as(inputs[spec.name])
        elif "attention_mask" in inputs:
            real = inputs["attention_mask"].bool()
        else:
            continue
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        try:
            result = run(model, inputs)
            with torch.no_grad():
                answers = dict(zip(program.entry.outputs, program.module()(**inputs), strict=True))
        except Exception as error:
            return _short(error)
        compared = 0
        for name, got in answers.items():
            expected = result[name] if name in result.keys() else None  # noqa: SIM118  (a ModelOutput iterates values)
            if not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
                continue
            if expected.shape != got.shape:
                return f"{name} is {list(got.shape)} instead of {list(expected.shape)}"
            compared += 1
            rows = real if real is not ... and got.shape[:2] == real.shape else ...
            if real is not ... and rows is ...:
                continue
            error = float((got[rows] - expected[rows]).abs().max() / expected[rows].abs().max().clamp(min=1e-30))
            if not error < 1e-4:
                return f"{name} differs by {error:.2g}" + (" with padding" if padded else "")
        if not compared:
            return "no output to compare"
    return "ok"


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
        inputs = random_inputs(program, _sizes(program, {"B": 2, "S": 11}), 2)
        with torch.no_grad():
            got, expected = (p.module(torch.float64)(**inputs)[0] for p in (after, reference))
            mask = inputs.get("attention_mask")
            real = mask.bool() if mask is not None and mask.shape == got.shape[:2] else ...
            error = float((got[real] - expected[real]).abs().max() / expected[real].abs().max())
            if not error <= tolerance(torch.float64, 4096):
                return f"differs from its emulation by {error:.2g}"
            with tempfile.TemporaryDirectory() as directory:
                graphopt.save(after, Path(directory) / "out", format="graphopt")
                inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
                again = graphopt.load(Path(directory) / "out").module()(**inputs)[0][real]
                before = after.module()(**inputs)[0][real]
                # Not bit for bit: a convolution's last bits follow where in memory its weights happen to lie.
                if not float((again - before).abs().max() / before.abs().max()) < 1e-5:
                    return "changes when it is saved and loaded"
    except GraphoptError as error:
        # Half of an odd number of heads cannot be grouped: what is asked for is not legal there.
        illegal = error.diagnostics[0].code == "head_count"
        return f"{'declined' if illegal else 'refused'}: {error.diagnostics[0].message}"[:200]
    except Exception as error:
        return "FAILED: " + _short(error)
    return "ok"


def _short(error: BaseException) -> str:
    if isinstance(error, GraphoptError):
        first = error.diagnostics[0]
        where = next((note for note in first.notes if note.startswith("model line")), "")
        return re.sub(r"/tmp/\w+", "DIR", first.message)[:200] + (
            f" ({where.split('site-packages/')[-1]})" if where else ""
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:140]} ({Path(last.filename).name}:{last.lineno})"


def _child(auto: str, model_type: str, surgeries: bool, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    try:
        row = run_class(auto, model_type, surgeries)
    except Exception as error:
        row = {"error": _short(error)}
    pipe.send(row)
    pipe.close()


def run_all(tasks: list[tuple[str, str]], surgeries: bool, workers: int, seconds: float, finish: Any) -> None:
    """Run every task in a forked child, `workers` at a time, and hand each row to `finish` as it comes."""
    context = get_context("fork")
    waiting, running = list(tasks), []
    while waiting or running:
        while waiting and len(running) < workers:
            auto, model_type = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(auto, model_type, surgeries, send))
            process.start()
            send.close()
            running.append((auto, model_type, process, receive, time.monotonic()))
        for task in list(running):
            auto, model_type, process, receive, started = task
            row = None
            if receive.poll(0.05):
                try:
                    row = receive.recv()
                except EOFError:
                    process.join()
                    row = {"error": f"the process ended with {process.exitcode}"}
            elif time.monotonic() - started > seconds:
                os.kill(process.pid, signal.SIGKILL)
                row = {"error": f"took more than {seconds:.0f} s"}
            if row is not None:
                process.join()
                running.remove(task)
                finish(auto, model_type, row | {"total_seconds": round(time.monotonic() - started, 1)})


def _store(results: Path, auto: str, model_type: str, row: dict[str, Any]) -> None:
    """Add one row to the file, which other runs may be writing too."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with (Path(tempfile.gettempdir()) / "graphopt-coverage.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(results.read_text()) if results.is_file() else {}
        rows.setdefault(auto, {})[model_type] = row
        beside = results.with_suffix(".tmp")
        beside.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        beside.replace(results)


def main() -> None:
    """Run what has no result yet, saving after every class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto", default="causal_lm", choices=[*AUTOS, "all"])
    parser.add_argument("--only", nargs="*", help="model types; runs them again")
    parser.add_argument("--selected", action="store_true", help="only the classes that represent their task")
    parser.add_argument("--failed", action="store_true", help="run again what has a result that is not right")
    parser.add_argument("--no-surgeries", action="store_true", help="capture, compare and view only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180, help="limit a class")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no class after this long")
    parser.add_argument("--page", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    results = arguments.results.resolve()
    rows = json.loads(results.read_text()) if results.is_file() else {}
    if not arguments.page:
        tasks = []
        for auto in AUTOS if arguments.auto == "all" else [arguments.auto]:
            chosen = SELECTED.get(auto, "").split() if arguments.selected else []
            for model_type in chosen or sorted(model_types(auto)):
                done = rows.get(auto, {}).get(model_type)
                again = arguments.failed and done is not None and not right(done)
                if model_type in arguments.only if arguments.only else (done is None or again):
                    tasks.append((auto, model_type))
        end = time.monotonic() + 60 * arguments.minutes

        def finish(auto: str, model_type: str, row: dict[str, Any]) -> None:
            print(auto, model_type, json.dumps(row), file=sys.stderr, flush=True)
            _store(results, auto, model_type, row)
            if time.monotonic() > end:
                raise SystemExit("out of time; run again to go on")

        run_all(tasks, not arguments.no_surgeries, arguments.workers, arguments.seconds, finish)
    if results == RESULTS:
        PAGE.write_text(page(json.loads(results.read_text()), list(SURGERIES), LAYERS))


def right(row: dict[str, Any]) -> bool:
    """Whether every check that was made of a class came out well, declines included."""
    if row.get("builds") != "ok":
        return row.get("builds") is not None
    from coverage_page import views_right

    cuts = row.get("surgeries", {}).values()
    return (
        row.get("captures") == "ok"
        and row["equal"] == row["disk"] == "ok"
        and views_right(row)
        and all(answer.startswith(("ok", "declined")) for answer in cuts)
    )


if __name__ == "__main__":
    main()
