"""Decoding on the shipped model: exactness against transformers' generate, and speed beside it, on this machine's CPU.

    python benchmarks/decode.py --exact        # 200 held-out prompts, 128 tokens each, alone and in padded batches of 8
    python benchmarks/decode.py --speed        # interleaved runs, batch 1, float32, one thread for all
    python benchmarks/decode.py --variants     # narrowed and shortened models beside their predicted costs
    python benchmarks/decode.py --products     # products with weights stored by columns and packed, by rows

Each writes its part of benchmarks/results/decode.json. Times are processor times of this process, so that other work on
the machine counts as little as it can; every figure is a median over interleaved repeats, and ratios are medians of the
ratios within a repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import graphopt
from graphopt.artifact import load
from graphopt.compiler.text import load_text
from graphopt.cost import cost
from graphopt.ir.program import Program
from graphopt.runtime import Decoder, generate, with_cache
from graphopt.runtime.lower import _by_columns as by_columns
from graphopt.runtime.native import pack, packed_linear

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny_lm"
RESULTS = ROOT / "benchmarks" / "results" / "decode.json"
NEW = 128
PROMPTS, BATCH = 200, 8
FREE = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def held_out(count: int) -> list[torch.Tensor]:
    """Prompts of 8 to 63 tokens, spread evenly over the held-out text."""
    tokens = load_text(MODEL / "heldout.txt", MODEL)
    starts = [i * (len(tokens) - 64) // count for i in range(count)]
    return [tokens[start : start + 8 + (37 * i) % 56] for i, start in enumerate(starts)]


def stock() -> Any:
    """The shipped model as transformers runs it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def decoder_of(program: Program) -> Decoder:
    """A float32 decoder, with a cache inserted."""
    cached, reason = with_cache(program)
    if reason is not None:
        raise SystemExit(f"no cache: {reason}")
    return Decoder(cached, torch.float32)


def exact(count: int) -> dict[str, Any]:
    """How many of so many prompts continue alike, token by token."""
    model, decoder, prompts = stock(), decoder_of(load(MODEL)), held_out(count)
    alone = 0
    for prompt in prompts:
        ids = prompt[None]
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **FREE)
        alone += torch.equal(generate(decoder, ids, max_new_tokens=NEW), theirs)
    together = 0
    for start in range(0, len(prompts), BATCH):
        rows = prompts[start : start + BATCH]
        longest = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        theirs = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **FREE)
        ours = generate(decoder, ids, padding=mask, max_new_tokens=NEW)
        together += int((ours == theirs).all(-1).sum())
    return {"prompts": len(prompts), "tokens": NEW, "alike_alone": alone, "alike_in_batches_of_8": together}


def bandwidth(repeats: int = 9) -> float:
    """Bytes a second that a copy of 64 MiB reads and writes."""
    source, target = torch.ones(1 << 24), torch.ones(1 << 24)
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - begin)
    return 2 * source.nbytes / statistics.median(times)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of each run, and the first run's ratio to every other within each repeat."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    first = next(iter(runs))
    return {
        name: {
            "tokens_per_second": round(tokens / statistics.median(spent), 1),
            "best": round(tokens / min(spent), 1),
            f"{first}_is_faster_by": round(
                statistics.median(b / a for a, b in zip(times[first], spent, strict=True)), 3
            ),
        }
        for name, spent in times.items()
    }


def streamed_bytes(program: Program, decoder: Decoder, entries: int) -> dict[str, int]:
    """Bytes that one token must read: every weight that a step multiplies by, and the committed entries."""
    # Small weights are also held in a second form, which steps of several rows read.
    taken = [(key, decoder.lowered.values.get(key)) for key in decoder.lowered.forms["token"].takes]
    weights = sum(
        value.numel() * value.element_size()
        for key, value in taken
        if isinstance(key, str) and isinstance(value, torch.Tensor) and value.dim() == 2
    )
    return {"weights": weights, "cache": decoder.cache(1, entries).bytes()}


def speed(repeats: int) -> dict[str, Any]:
    """Greedy decoding of 128 tokens after a prompt of 32, batch 1."""
    torch.set_num_threads(1)
    model, program = stock(), load(MODEL)
    decoder = decoder_of(program)
    ids = load_text(MODEL / "heldout.txt", MODEL)[:32][None]
    mask = torch.ones_like(ids)

    def theirs(**options: Any) -> torch.Tensor:
        result: torch.Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **FREE, **options)
        return result

    runs: dict[str, Callable[[], object]] = {
        "graphopt": lambda: generate(decoder, ids, max_new_tokens=NEW),
        "transformers_dynamic": theirs,
        "transformers_static": lambda: theirs(cache_implementation="static"),
    }
    found = interleaved(runs, repeats, NEW)
    copied = bandwidth()
    size = streamed_bytes(program, decoder, 32 + NEW // 2)
    bound = copied / (size["weights"] + size["cache"])
    return {
        "threads": 1,
        "dtype": "float32",
        "prompt": 32,
        "new_tokens": NEW,
        "repeats": repeats,
        "runs": found,
        "copy_gb_per_second": round(copied / 1e9, 2),
        "bytes_per_token": size,
        "bound_tokens_per_second": round(bound, 1),
        "share_of_bound": round(found["graphopt"]["tokens_per_second"] / bound, 3),
        "share_of_bound_best": round(found["graphopt"]["best"] / bound, 3),
    }


VARIANTS = {
    "narrow": [{"use": "regroup_kv", "kv_heads": "heads / 2", "init": "mean"},
               {"use": "prune_neurons", "keep": "50%", "score": "magnitude"}],
    "skip_2_of_6": [{"use": "skip_layers", "layers": [2, 4]}],
    "heads_half": [{"use": "prune_heads", "keep": "50%", "unit": "kv_group", "score": "magnitude"}],
}  # fmt: skip


def variants(repeats: int) -> dict[str, Any]:
    """Speed of changed models beside what their costs predict."""
    from graphopt.passkit import PassRegistry
    from graphopt.spec import parse_spec

    torch.set_num_threads(1)
    base = load(MODEL)
    programs = {"base": base}
    for name, steps in VARIANTS.items():
        loaded = parse_spec(json.dumps({"graphopt": 1, "steps": steps}), registry=PassRegistry())
        programs[name] = graphopt.compile(base, loaded, verify="shapes")
    decoders = {name: decoder_of(program) for name, program in programs.items()}
    ids = load_text(MODEL / "heldout.txt", MODEL)[:32][None]
    runs = {
        name: (lambda decoder=decoder: generate(decoder, ids, max_new_tokens=NEW)) for name, decoder in decoders.items()
    }
    found = interleaved(runs, repeats, NEW)
    for name, program in programs.items():
        flops = cost(program).at(B=1, S=1)["flops"] / cost(base).at(B=1, S=1)["flops"]
        size, whole = (sum(streamed_bytes(p, decoders[n], 96).values()) for n, p in ((name, program), ("base", base)))
        found[name] |= {
            "flops_share": round(flops, 3),
            "bytes_share": round(size / whole, 3),
            "time_share": round(found["base"]["tokens_per_second"] / found[name]["tokens_per_second"], 3),
        }
    return {"repeats": repeats, "runs": found}


def products(repeats: int) -> list[dict[str, Any]]:
    """Microseconds of products by stored form, over 12 MB of weights of one size in turn."""
    multiply, rest = packed_linear()
    found = []
    with torch.inference_mode():
        for out, entries in ((2048, 192), (1024, 1024), (4096, 2048)):
            weights = [torch.randn(out, entries) for _ in range(max(2, int(3e6 / (out * entries))))]
            columns, packed = [by_columns([w]) for w in weights], [pack(w) for w in weights]
            for rows in (1, 4, 8, 64):
                x = torch.randn(1, rows, entries)
                took: dict[str, list[float]] = {"columns": [], "packed": []}
                for _ in range(repeats):
                    started = time.process_time()
                    for w in columns:
                        torch.nn.functional.linear(x, w)
                    middle = time.process_time()
                    for w in packed:
                        multiply(x, w, None, *rest)
                    took["columns"].append((middle - started) / len(columns))
                    took["packed"].append((time.process_time() - middle) / len(packed))
                times = {name: round(1e6 * statistics.median(each), 1) for name, each in took.items()}
                ratio = statistics.median(a / b for a, b in zip(*took.values(), strict=True))
                found.append({"weight": [out, entries], "rows": rows, **times, "ratio": round(ratio, 2)})
    return found


def main() -> None:
    """Run what is asked for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    given = parser.parse_args()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    parts = {
        "exact": lambda: exact(given.prompts),
        "speed": lambda: speed(given.repeats),
        "variants": lambda: variants(given.repeats),
        "products": lambda: products(given.repeats),
    }
    for name, part in parts.items():
        if getattr(given, name):
            found = part()
            # Another run may have written its part meanwhile.
            kept = {**(json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}), name: found, "machine": machine}
            RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
            print(json.dumps({name: found}, indent=2))


if __name__ == "__main__":
    main()
