"""Quality against cache bytes for every policy on the shipped model: benchmarks/results/cache_policies.json, docs/.

Perplexity is over the second half of windows of held-out text that are as long as the model's positions allow, each
token predicted with what the policy keeps of all before it. Bytes are those of the buffers of a cache for one such
window, measured on the tensors and compared with the formula of the method.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import graphopt
from graphopt.compiler.text import tokens_of
from graphopt.cost import cost
from graphopt.ir.leaving import PROMPT, admitting, with_prompt
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.observe.text import token_input
from graphopt.passes.cache.bounded import Bound
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import Plan, apply_edits
from graphopt.runtime import Decoder
from graphopt.runtime.cache import Cache
from graphopt.spec import parse_spec
from graphopt.views import Views

aten = torch.ops.aten
ops = torch.ops.graphopt
ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_lm"
RESULTS = ROOT / "benchmarks" / "results" / "cache_policies.json"
PLOT = ROOT / "docs" / "cache_policies.svg"
LENGTH, BATCH = 512, 4
BUDGETS = (16, 64, 256)
SINK = 4
RECIPE = {"steps": 60, "batch": 1, "seq": 256, "rate": 5e-2, "warmup": 5}
GRIDS = [{"bits": bits, "group": 32, "recent": recent} for recent in (32, 128) for bits in (8, 4, 2)]
GATES = {"use": "learn_gates", "sink": SINK, "recent": 60, "recipe": RECIPE}


SHARES, PREDICTOR = (75, 50, 25), 2
ADMIT = {
    "use": "drop_tokens",
    "span": "answer",
    "layers": PREDICTOR,
    "score": {"kind": "predictor", "width": 64},
    "recipe": {"steps": 120, "batch": 4, "seq": 256, "rate": 5e-3, "warmup": 10},
}


def policies(entries: int) -> dict[str, list[dict[str, Any]]]:
    """The steps of every policy whose bounded heads keep `entries`."""
    recent = entries - SINK
    streaming = {"use": "bound_cache", "sink": SINK, "recent": recent}
    heavy = (entries - SINK) // 2
    return {
        "last tokens only": [{**streaming, "sink": 0, "recent": entries}],
        "StreamingLLM, places kept": [streaming],
        "StreamingLLM, renumbered": [{**streaming, "positions": "renumber"}],
        "H2O": [{**streaming, "recent": recent - heavy, "heavy": heavy}],
        "H2O without sinks": [
            {**streaming, "sink": 0, "recent": entries - entries // 2, "heavy": entries // 2},
        ],
        "compensation, no head protected": [{**streaming, "recent": recent - 1, "compensate": True}],
        "RazorAttention": [{**streaming, "recent": recent - 1, "compensate": True, "protect": {"kind": "probe"}}],
        "DuoAttention, 25% whole": [GATES, {**streaming, "protect": {"kind": "gates", "keep": "25%"}}],
    }


def apply(program: Program, steps: list[dict[str, Any]]) -> Program:
    """The program after some steps, verified by shapes alone: tests verify the passes in full."""
    calibration = {"data": str(MODEL / "calibration.txt"), "samples": 64, "seq": 256, "batch": 8}
    spec = {"graphopt": 1, "calibration": calibration, "steps": steps}
    loaded = parse_spec(yaml.safe_dump(spec), registry=PassRegistry(), file="cache_policies.yaml")
    return graphopt.compile(program, loaded, verify="shapes")


def changed(program: Program, step: dict[str, Any]) -> tuple[Program, Plan]:
    """The program after one step that trains nothing, unmeasured, and its plan."""
    config = PassRegistry().get(step["use"]).model_validate({k: v for k, v in step.items() if k != "use"})
    views = Views(program)
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    return apply_edits(program, views, plan.edits, config.name), plan


def perplexity(program: Program, windows: torch.Tensor) -> float:
    """Perplexity of the second half of windows `[N, T]`, the first half given."""
    run, name = program.module(torch.float32), token_input(program)
    total, half = 0.0, windows.shape[1] // 2
    with torch.no_grad():
        for ids in windows.split(BATCH):
            logits = run(**{name: ids})[0][:, half - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten())) * len(ids)
    return math.exp(total / len(windows))


def cache_bytes(program: Program, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Bytes of keys and values in a cache for one window, and of what is written down beside them."""
    buffers = Cache(changed(program, {"use": "insert_cache"})[0], 1, LENGTH, dtype).buffers
    sizes = {name: buffer.numel() * buffer.element_size() for name, buffer in buffers.items()}
    beside = sum(size for name, size in sizes.items() if name.endswith(("_places", "_mass")))
    return sum(sizes.values()) - beside, beside


def row(program: Program, whole: dict[str, Any], name: str, entries: int, windows: torch.Tensor) -> dict[str, Any]:
    """One policy at one budget."""
    started = time.perf_counter()
    bounded, plan = changed(program, policies(entries)[name][-1])
    size, beside = cache_bytes(bounded)
    heads = [len(edit.heads) for edit in plan.edits if isinstance(edit, Bound)]
    layers, kv_heads = whole["layers"], whole["kv_heads"]
    kept = sum(heads) * entries + (layers * kv_heads - sum(heads)) * LENGTH
    return {
        "policy": name,
        "entries": entries,
        "bytes": size,
        "formula": kept * whole["bytes"] // (layers * kv_heads * LENGTH),
        "beside": beside,
        "share": size / whole["bytes"],
        "perplexity": perplexity(bounded, windows),
        "seconds": round(time.perf_counter() - started, 1),
    }


def quantised_row(program: Program, grid: dict[str, int], windows: torch.Tensor) -> dict[str, Any]:
    """One grid of a quantised cache: bytes of its buffers, as shares of the whole cache's, and perplexity."""
    coarse, _ = changed(program, {"use": "quantize_cache", **grid})
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        (size, _), (whole, _) = cache_bytes(coarse, dtype), cache_bytes(program, dtype)
        sizes |= {f"bytes_{name}": size, f"share_{name}": size / whole}
    # Formulae count in the dtype that the model is stored in.
    formula = int(cost(coarse).at(B=1, S=LENGTH)["kv_bytes"])
    return {**grid, **sizes, "formula_bfloat16": formula, "perplexity": perplexity(coarse, windows)}


def by_chance(program: Program, share: float, seed: int) -> Program:
    """The program with words admitted by chance, the same places in every text."""
    rewriter = Rewriter(program)
    core = admitting(program)[0]
    decided = rewriter.node(core.args[9].args[0])  # type: ignore[union-attr,arg-type]
    drawn = rewriter.call(ops.random_scores.default, rewriter.input_node(token_input(program)), seed, before=decided)
    chosen = rewriter.call(aten.gt.Scalar, drawn, 1 - share, before=decided)
    dtype = decided.meta["val"].dtype
    rewriter.replace(decided, rewriter.call(aten.to.dtype, chosen, dtype, before=decided))
    return rewriter.finish()


def behind_prompt(program: Program, windows: torch.Tensor) -> float:
    """Perplexity of the second half of windows `[N, T]` when the first half is a prompt, which stays whole."""
    half = windows.shape[1] // 2
    run, total = with_prompt(program).module(torch.float32), 0.0
    with torch.no_grad():
        for ids in windows.split(BATCH):
            logits = run(**{token_input(program): ids, PROMPT: torch.ones_like(ids[:, :half])})[0][:, half - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten())) * len(ids)
    return math.exp(total / len(windows))


def held_bytes(program: Program, windows: torch.Tensor, prompt: int) -> tuple[float, float]:
    """Mean bytes of a cache that has taken a window in, and the share of words behind the prompt that it has admitted."""
    decoder = Decoder(changed(program, {"use": "insert_cache"})[0])
    sizes, shares = [], []
    for ids in windows[:, None]:
        cache = decoder.cache(1, LENGTH, prompt=prompt)
        for piece in ids.split([prompt, LENGTH - prompt], 1):
            decoder.step(cache, piece)
            cache.commit(piece.shape[1])
        sizes.append(cache.bytes())
        places = next(buffer for name, buffer in cache.buffers.items() if name.endswith("_held_places"))
        shares.append((int((places >= 0).sum()) - prompt) / (LENGTH - prompt))
    return sum(sizes) / len(sizes), sum(shares) / len(shares)


def admitted_row(program: Program, whole: dict[str, Any], share: int, windows: torch.Tensor) -> dict[str, Any]:
    """A predictor that aims at a share: what it admits, bytes and perplexity, without a prompt and behind one."""
    made = apply(program, [{**ADMIT, "keep": f"{share}%"}])
    found: dict[str, Any] = {"aim": share, "training": made.trail[-1].certificate["training"]}
    for name, prompt, measure in (("text", 1, perplexity), ("answer", LENGTH // 2, behind_prompt)):
        size, kept = held_bytes(made, windows, prompt)
        chance = [measure(by_chance(made, kept, seed), windows) for seed in range(3)]
        found[name] = {
            "kept": kept,
            "bytes": size,
            "share": size / whole["bytes"],
            "perplexity": measure(made, windows),
            "chance": chance,
        }
    return found


def plot(stored: dict[str, Any], file: Path) -> None:
    """Perplexity over cache bytes, one line a policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "graphopt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    whole = stored["whole"]
    for name in policies(BUDGETS[0]):
        rows = [each for each in stored["rows"] if each["policy"] == name]
        axes.plot([r["share"] * 100 for r in rows], [r["perplexity"] for r in rows], marker="o", label=name)
    axes.axhline(whole["perplexity"], color="black", linestyle=":", label="whole cache")
    axes.set_xscale("log")
    ticks = [3, 6, 12, 25, 50, 100]
    axes.set_xticks(ticks, [f"{tick}%" for tick in ticks])
    axes.set_yscale("log")
    low, high = whole["perplexity"], max(r["perplexity"] for r in stored["rows"])
    marks = [low * (high / low) ** (i / 5) for i in range(6)]
    axes.set_yticks(marks, [f"{mark:.1f}" for mark in marks])
    axes.minorticks_off()
    axes.set_xlabel(f"bytes of the cache at {LENGTH} tokens, of {whole['bytes'] / 2**20:.1f} MiB (float32)")
    axes.set_ylabel("perplexity of the second half")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Run the policies that are asked for and write them beside those that were not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="policies, by name")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--quantised", action="store_true", help="only the quantised caches, beside the stored rows")
    parser.add_argument(
        "--admitted", action="store_true", help="only words that a predictor admits, beside stored rows"
    )
    parser.add_argument("--plot", action="store_true", help="only draw the plot again, from the stored figures")
    arguments = parser.parse_args()
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if arguments.plot:
        plot(stored, PLOT)
        return
    torch.set_num_threads(1)
    program = graphopt.capture(MODEL)
    text = tokens_of(program, MODEL / "heldout.txt")
    # Windows all over the text, not its beginning alone.
    starts = torch.linspace(0, len(text) - LENGTH, arguments.windows).long()
    windows = torch.stack([text[start : start + LENGTH] for start in starts.tolist()])
    size, _ = cache_bytes(program)
    stored["whole"] = {"perplexity": perplexity(program, windows), "bytes": size, "layers": 6, "kv_heads": 8}
    stored |= {"length": LENGTH, "windows": len(windows), "predicted": windows.numel() // 2}
    if arguments.quantised:
        stored["quantised"] = [quantised_row(program, grid, windows) for grid in GRIDS]
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(json.dumps(stored["quantised"], indent=1), file=sys.stderr)
        return
    if arguments.admitted:
        stored["admitted"] = [admitted_row(program, stored["whole"], share, windows) for share in SHARES]
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(json.dumps(stored["admitted"], indent=1), file=sys.stderr)
        return
    gated = None
    for name in policies(BUDGETS[0]):
        if arguments.only and name not in arguments.only:
            continue
        start = program
        if policies(BUDGETS[0])[name][0]["use"] == "learn_gates":
            gated = gated or apply(program, [GATES])
            start = gated
            stored["gates"] = gated.trail[-1].certificate["training"]
        for entries in BUDGETS:
            found = row(start, stored["whole"], name, entries, windows)
            print(json.dumps(found), file=sys.stderr, flush=True)
            write(stored, found)


def write(stored: dict[str, Any], found: dict[str, Any]) -> None:
    """Put one row beside those that the file holds by now."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    order = [(name, entries) for name in policies(BUDGETS[0]) for entries in BUDGETS]
    table = {(each["policy"], each["entries"]): each for each in [*rows, found]}
    stored["rows"] = [table[key] for key in order if key in table]
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
