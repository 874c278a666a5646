"""The shipped decoder as a mixture of experts: exactness, what fewer active experts cost and what they save.

    python benchmarks/experts.py --exact      # all experts active: against the dense model, and as a stock checkpoint
    python benchmarks/experts.py --quality    # perplexity by active experts and router
    python benchmarks/experts.py --bits       # perplexity and bytes by bits of the experts, and with choices dropped
    python benchmarks/experts.py --speed      # processor time for a token beside the FLOPs, one thread, interleaved
    python benchmarks/experts.py --page       # docs/experts.md from the stored figures

Each writes its part of benchmarks/results/experts.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import yaml

import graphopt
from graphopt.artifact import save
from graphopt.compiler.text import evaluate, load_text
from graphopt.cost import cost
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.weights.packing import Pack
from graphopt.passes.weights.quantize import Quantize
from graphopt.passkit import Context, PassRegistry
from graphopt.runtime import Decoder
from graphopt.runtime.with_cache import with_cache
from graphopt.spec import parse_spec
from graphopt.views import Views

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny_lm"
RESULTS = ROOT / "benchmarks" / "results" / "experts.json"
EXPERTS, ACTIVE, SEEDS = 8, (6, 4, 2), (0, 1, 2)
SAMPLES, SEQ = 64, 256
BITS_ACTIVE, GROUP = 4, 128
# Bits on average, and the widths that an expert may have.
BITS = ((2, (1, 2, 3)), (2.5, (1, 2, 3)), (2.5, (2, 3)), (3, (2, 3, 4)), (4, (3, 4, 5)))
PAPER = {"frequency": 1, "mass": 1.5, "error": 2}
BY_ERROR = {"frequency": 0, "mass": 0, "error": 2}
RECIPE = {"steps": 150, "batch": 4, "seq": 128, "rate": 2e-3, "warmup": 10}


def run(program: Program, *steps: dict[str, Any]) -> Program:
    """The program after some steps, calibrated on the model's own calibration text."""
    text = {"data": str(MODEL / "calibration.txt"), "samples": SAMPLES, "seq": SEQ, "batch": 8}
    spec = {"graphopt": 1, "calibration": text, "verify": "off", "steps": list(steps)}
    return graphopt.compile(program, parse_spec(yaml.safe_dump(spec), registry=PassRegistry(), file="experts.yaml"))


def step(router: Any, active: int, partition: Any = "kmeans") -> dict[str, Any]:
    """One refactoring into eight experts."""
    choose = {"kind": "top", "k": active}
    return {"use": "refactor_moe", "experts": EXPERTS, "partition": partition, "router": router, "choose": choose}


def exact(program: Program) -> dict[str, Any]:
    """Logits of dense and refactored model on held-out text, from the graph and from transformers after saving."""
    made = run(program, step("zero", EXPERTS, "order"))
    tokens = load_text(MODEL / "heldout.txt", MODEL)[: 8 * SEQ].reshape(8, SEQ)
    found: dict[str, Any] = {"tokens": tokens.numel()}
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        report = save(made, Path(directory) / "out", format="transformers")
        stock = transformers.AutoModelForCausalLM.from_pretrained(report.directory, dtype=torch.float32).eval()
        dense = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        found |= {"class": type(stock).__name__, "bytes": report.bytes}
        theirs = dense(tokens).logits
        found["largest_logit"] = float(theirs.abs().max())
        found["graph"] = float((made.module(torch.float32)(input_ids=tokens)[0] - theirs).abs().max())
        found["stock"] = float((stock(tokens).logits - theirs).abs().max())
        wide = program.module(torch.float64)(input_ids=tokens)[0]
        found["float64"] = float((made.module(torch.float64)(input_ids=tokens)[0] - wide).abs().max())
        found["dense_rounding"] = float((theirs - wide).abs().max())
        found["reordered"] = [float((reordered(dense, seed)(tokens).logits - theirs).abs().max()) for seed in range(10)]
    return found


def reordered(dense: Any, seed: int) -> Any:
    """The dense model with the neurons of its feed-forwards in another order: the same sums, rounded elsewhere."""
    other = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(seed)
    for layer in other.model.layers:
        order = torch.randperm(layer.mlp.down_proj.weight.shape[1], generator=generator)
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
            weight.copy_(weight[order])
    return other


def quality(program: Program) -> dict[str, Any]:
    """Perplexity on held-out text."""

    def measured(made: Program) -> float:
        return round(evaluate(made, MODEL / "heldout.txt", SAMPLES, SEQ)["perplexity"], 4)

    found: dict[str, Any] = {"dense": measured(program), "rows": []}
    for active in ACTIVE:
        row: dict[str, Any] = {"active": active}
        row["random"] = [measured(run(program, step({"kind": "random", "seed": s}, active))) for s in SEEDS]
        row["static"] = measured(run(program, step("static", active)))
        row["fitted_in_order"] = measured(run(program, step("fitted", active, "order")))
        row["fitted"] = measured(run(program, step("fitted", active)))
        row["trained"] = measured(run(program, step("trained", active)))
        distilling = {"use": "recover", "weights": "routers", "recipe": RECIPE}
        row["distilled"] = measured(run(program, step("fitted", active), distilling))
        print(json.dumps(row), file=sys.stderr, flush=True)
        found["rows"].append(row)
    return found


def bits(program: Program) -> dict[str, Any]:
    """Perplexity and bytes on disk by the bits of the experts, and by which choices are dropped as well."""
    base = run(program, step("fitted", BITS_ACTIVE))

    def measured(made: Program) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            size = save(made, Path(directory) / "out", format="graphopt").bytes
        found = {
            "perplexity": round(evaluate(made, MODEL / "heldout.txt", SAMPLES, SEQ)["perplexity"], 4),
            "bytes": size,
        }
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    found: dict[str, Any] = {"dense": measured(program), "full": measured(base), "rows": [], "dropping": []}
    for average, widths in BITS:
        row: dict[str, Any] = {"bits": average, "widths": widths}
        row["uniform"] = measured(_rounded(base, average))
        row["paper"] = measured(run(base, _allocated(average, widths, PAPER)))
        row["by_error"] = measured(run(base, _allocated(average, widths, BY_ERROR)))
        found["rows"].append(row)
    for below in (0.5, 0.7, "median"):
        drop = {"use": "reroute", "below": below, "protect": "2%", "where": {"layers": "1..-1"}}
        dropped = run(base, drop)
        shares = [noted["dropped"] for noted in dropped.trail[-1].certificate["notes"]["dropped"].values()]
        row = {"below": below, "dropped": round(statistics.mean(shares), 3), "full": measured(dropped)}
        row["by_error"] = measured(run(dropped, _allocated(2.5, (2, 3), BY_ERROR)))
        found["dropping"].append(row)
    spec = ROOT / "specs" / "methods" / "mc_moe.yaml"
    return found | {"spec": measured(graphopt.compile(base, spec, overrides=["verify=off"]))}


def _allocated(average: float, widths: Sequence[int], powers: dict[str, float]) -> dict[str, Any]:
    """Experts of several widths, everything else as it is."""
    experts = {"widths": list(widths), "average": average, "required": [], **powers}
    return {"use": "quantize", "parts": ["experts"], "group": GROUP, "experts": experts}


def _rounded(program: Program, average: float) -> Program:
    """All experts in as many bits; where that is no whole number, every other one in the next."""
    views, rewriter = Views(program), Rewriter(program)
    plan = Quantize(parts=("experts",), group=GROUP).plan(Context(views, tuple(range(len(views.blocks)))))
    widths = tuple(int(average) + (i % 2) * (average != int(average)) for i in range(EXPERTS))
    for edit in plan.edits:
        assert isinstance(edit, Pack)
        replace(edit, bits=widths).apply(rewriter, views)
    return rewriter.finish()


def speed(program: Program, repeats: int) -> dict[str, Any]:
    """Microseconds of processor time and FLOPs a token of the dense model and of 8, 6, 4 and 2 active experts."""
    torch.set_num_threads(1)
    shapes = [(1, 1), (1, 256), (8, 128)]
    made = {"dense": program, str(EXPERTS): run(program, step("zero", EXPERTS, "order"))}
    made |= {str(k): run(program, step("fitted", k)) for k in ACTIVE}
    wide = _wide()
    found: dict[str, Any] = {"machine": f"{platform.machine()} {platform.system()}", "models": {}}
    for title, models in (("shipped", made), ("wide", {k: _of_wide(wide, k) for k in made})):
        rows = []
        for batch, seq in shapes:
            ids = torch.randint(3, 2000, (batch, seq), generator=torch.Generator().manual_seed(0))
            made_for = _decoding if seq == 1 else _reading
            runners = {name: made_for(model, ids) for name, model in models.items()}
            times: dict[str, list[float]] = {name: [] for name in runners}
            with torch.no_grad():
                for turn in range(repeats + 1):
                    for name, runner in runners.items():
                        begin = time.process_time()
                        runner()
                        if turn:
                            times[name].append(time.process_time() - begin)
            flops = {name: cost(model).at(B=batch, S=seq)["flops"] for name, model in models.items()}
            for name in runners:
                ratios = [mine / dense for mine, dense in zip(times[name], times["dense"], strict=True)]
                rows.append(
                    {
                        "active": name,
                        "batch": batch,
                        "seq": seq,
                        "us_per_token": round(1e6 * statistics.median(times[name]) / (batch * seq), 2),
                        "time_ratio": round(statistics.median(ratios), 3),
                        "flop_ratio": round(flops[name] / flops["dense"], 3),
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        found["models"][title] = rows
    return found


def _reading(program: Program, ids: torch.Tensor) -> Callable[[], Any]:
    runner = program.module(torch.float32)
    return lambda: runner(input_ids=ids)


def _decoding(program: Program, ids: torch.Tensor) -> Callable[[], Any]:
    """One more token behind 64 in the cache."""
    decoder = Decoder(with_cache(program)[0], torch.float32)
    cache = decoder.cache(len(ids), 128)
    decoder.step(cache, torch.arange(3, 67).expand(len(ids), -1))
    cache.commit(64)
    return lambda: decoder.step(cache, ids)


def _wide() -> Program:
    """Two layers of a Llama of usual proportions, with random weights."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 12}
    config = transformers.LlamaConfig(vocab_size=2048, **sizes)
    torch.manual_seed(0)
    return graphopt.capture(transformers.AutoModelForCausalLM.from_config(config).float())


def _of_wide(program: Program, name: str) -> Program:
    if name == "dense":
        return program
    router = "zero" if name == str(EXPERTS) else "random"
    return run(program, step(router, int(name), "order"))


def page(found: dict[str, Any]) -> str:
    """docs/experts.md."""
    lines = [
        "# A dense model as a mixture of experts",
        "",
        "The shipped decoder (examples/tiny_lm) after `refactor_moe` into 8 experts. Written by `python benchmarks/experts.py",
        "--page` from benchmarks/results/experts.json.",
        "",
        "A routed graph gathers one matrix for each token and chosen expert, as transformers' `batched_mm` does: that",
        "is what a captured Mixtral is and later passes see a bank. Whatever runs a program (evaluation, training,",
        "checkpoints) works expert by expert instead: rows are put in the order of their experts once, stay in it from the",
        "first product to the last, and are added to their tokens; what nobody chose, or a token drops, is not computed.",
        "",
    ]
    if "exact" in found:
        e = found["exact"]
        lines += [
            "## All experts active",
            "",
            f"Partition by order, zero router, {e['tokens']:,} held-out tokens, float32, logits up to"
            f" {e['largest_logit']:.1f}:",
            "",
            "| | largest difference of logits |",
            "|---|---|",
            f"| graph against dense | {e['graph']:.2g} |",
            f"| saved and loaded as {e['class']}, against dense | {e['stock']:.2g} |",
            f"| graph against dense in float64 | {e['float64']:.2g} |",
            f"| for comparison: dense in float32 against float64 | {e['dense_rounding']:.2g} |",
            f"| for comparison: dense against itself with its neurons in another order, {len(e['reordered'])} orders |"
            f" {min(e['reordered']):.2g} to {max(e['reordered']):.2g} |",
            "",
        ]
    if "quality" in found:
        q = found["quality"]
        lines += [
            "## Fewer active",
            "",
            f"Perplexity on held-out text (dense {q['dense']:.3f}), {SAMPLES} sequences of {SEQ} tokens; experts are",
            "not trained. Groups by co-activation except where said. `random`: mean of three seeds, in brackets the best;",
            "`static`: the experts that add most in the mean, for every token; `fitted`: ridge regression on the dense",
            "model's activations; `trained`: on the same activations, to choose the experts that a token would miss most;",
            f"`distilled`: fitted, and then {RECIPE['steps']} steps of distilling the routers alone (`recover` with",
            "`weights: routers`).",
            "",
            "| active of 8 | random | static | fitted, by order | fitted | trained | distilled |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in q["rows"]:
            mean, best = sum(row["random"]) / len(row["random"]), min(row["random"])
            lines.append(
                f"| {row['active']} | {mean:.2f} ({best:.2f}) | {row['static']:.2f} | {row['fitted_in_order']:.2f}"
                f" | {row['fitted']:.2f} | {row['trained']:.2f} | {row['distilled']:.2f} |"
            )
        lines.append("")
        if all(row["distilled"] > row["fitted"] for row in q["rows"]):
            lines += [
                "Distilling the routers alone makes them worse here: its gradient reaches them through the weights of the",
                "experts that were chosen, and says nothing of those that should have been.",
                "",
            ]
    if "bits" in found:
        lines += _bits_page(found["bits"])
    if "speed" in found:
        lines += [
            "## Time and FLOPs",
            "",
            "Processor time for a token beside the whole model's FLOPs, each as a share of the dense model's; one thread,",
            "float32, medians of ratios within interleaved repeats. 1 x 1 is a step of cached decoding behind 64 tokens, the",
            "others read whole texts. `wide` has random weights: two layers, width 768, 3,072 neurons.",
            "",
            "| model | batch x length | active of 8 | us a token | time | FLOPs |",
            "|---|---|---|---|---|---|",
        ]
        for title, rows in found["speed"]["models"].items():
            lines += [
                f"| {title} | {r['batch']} x {r['seq']} | {r['active']} | {r['us_per_token']:g} | {r['time_ratio']:.2f}"
                f" | {r['flop_ratio']:.2f} |"
                for r in rows
            ]
        lines += [
            "",
            "Wide experts take 1.02 to 1.13 times what their FLOPs say on 256 and 1,024 tokens, narrow ones 1.1 to 1.4 times:",
            "there, calls of ops and the sorting of rows cost as much as the small products do. So they do for a token on its",
            "own, for which two wide experts take 1.4 and two narrow ones 2.2 times what their FLOPs say.",
            "",
        ]
    return "\n".join(lines)


def _bits_page(found: dict[str, Any]) -> list[str]:
    """Two tables: bits against perplexity, and choices dropped."""

    def cell(one: dict[str, Any]) -> str:
        return f"{one['perplexity']:.2f} ({one['bytes'] / 1e6:.2f} MB)"

    whole, spec = found["full"], found["spec"]
    lines = [
        "## Bits of the experts",
        "",
        f"{BITS_ACTIVE} of 8 active, fitted router, experts rounded without training (`quantize`, groups of {GROUP}), all",
        f"else in bfloat16 as shipped: perplexity, in brackets the size on disk. Full precision: {cell(whole)}; dense",
        f"model: {cell(found['dense'])}. `uniform`: the same bits for each expert, for 2.5 by turns 2 and 3; the others",
        "are the exact best widths for each layer, on average the bits of the row: `MC-MoE` with the powers of the paper",
        "(how often an expert is chosen, what its choices count to the power 1.5, its error squared), `error` with the",
        "squared error of the layer's output alone.",
        "",
        "| bits | widths | uniform | MC-MoE | error |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        widths = ", ".join(map(str, row["widths"]))
        lines.append(
            f"| {row['bits']} | {widths} | {cell(row['uniform'])} | {cell(row['paper'])} | {cell(row['by_error'])} |"
        )
    if all(row["paper"]["perplexity"] > row["by_error"]["perplexity"] for row in found["rows"]):
        lines += [
            "",
            "The powers of the paper are worse than the error alone in every row: the layer's error holds already how often",
            "an expert is chosen and what its choices count.",
        ]
    lines += [
        "",
        "Choices dropped token by token behind the first layer (`reroute` with `protect: 2%`): the share of choices that",
        "calibration text drops there, and perplexity with experts in full precision and in 2.5 bits (2 and 3, by error):",
        "",
        "| dropped below this share of the best choice | choices dropped | full precision | 2.5 bits |",
        "|---|---|---|---|",
    ]
    for row in found["dropping"]:
        full, few = row["full"]["perplexity"], row["by_error"]["perplexity"]
        lines.append(f"| {row['below']} | {row['dropped']:.0%} | {full:.2f} | {few:.2f} |")
    return [*lines, "", f"specs/methods/mc_moe.yaml as it stands, all other matrices in 4 bits: {cell(spec)}.", ""]


def main() -> None:
    """Run what is asked for and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("exact", "quality", "bits", "speed", "page"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments.exact or arguments.quality or arguments.bits or arguments.speed:
        program = graphopt.capture(MODEL)
        if arguments.exact:
            found["exact"] = exact(program)
        if arguments.quality:
            found["quality"] = quality(program)
        if arguments.bits:
            found["bits"] = bits(program)
        if arguments.speed:
            found["speed"] = speed(program, arguments.repeats)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    (ROOT / "docs" / "experts.md").write_text(page(found))


if __name__ == "__main__":
    main()
