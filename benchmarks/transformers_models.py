"""A sample of transformers' model classes through `torch.compile(backend=...)` on a CPU: beside eager, at several lengths.

python benchmarks/transformers_models.py --backend graphopt --out benchmarks/results/transformers_models.json
python benchmarks/transformers_models.py --table --out benchmarks/results/transformers_models.json

Models are small and random, built by small_models.py, in float32. Each is called without a cache at `LENGTHS`; a result
is right when it is as near to float64 as eager's own, up to `WITHIN` times (as near to eager as a few
roundings, where a class does not run in float64). `graphs` is how often the backend was called
for the first length, `recompiled` how often more for the other lengths. Every class has a limit of its own; a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.op_db import limit
from benchmarks.small_models import build, run, sample_inputs

# Kinds of attention, positions, norms and feed-forwards, encoders and pictures among them.
CLASSES = (
    "causal_lm/llama", "causal_lm/gpt2", "causal_lm/gpt_neox", "causal_lm/opt", "causal_lm/bloom", "causal_lm/falcon",
    "causal_lm/phi", "causal_lm/qwen2", "causal_lm/qwen3", "causal_lm/gemma2", "causal_lm/gemma3_text",
    "causal_lm/mistral", "causal_lm/mixtral", "causal_lm/olmo2", "causal_lm/cohere", "causal_lm/starcoder2",
    "causal_lm/stablelm", "causal_lm/gptj", "causal_lm/codegen", "causal_lm/mpt", "causal_lm/deepseek_v3",
    "causal_lm/gpt_oss", "causal_lm/granite", "causal_lm/mamba", "masked_lm/bert", "masked_lm/roberta",
    "masked_lm/distilbert", "masked_lm/modernbert", "masked_lm/albert", "seq2seq/t5", "seq2seq/bart",
    "sequence_classification/bert", "image_classification/vit", "image_classification/convnext",
    "image_classification/swin", "speech_seq2seq/whisper",
)  # fmt: skip
LENGTHS = (19, 23, 40, 8)
WITHIN = 8


def judge(name: str, backend: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """One class: `result` is ok, wrong, backend_error (eager captures it), not_capturable or not_built, with counts."""
    try:
        model, _ = build(*name.split("/"))
    except Exception as error:
        return {"result": "not_built", "reason": _line(error)}
    exact = copy.deepcopy(model).double()
    calls = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs, **({"options": options} if options else {}))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counted)
    begin, first, worst = time.perf_counter(), 0, 0.0
    for length in LENGTHS:
        inputs = sample_inputs(model, seq=length)
        base = _floats(run(model, inputs))
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        try:
            true = _floats(run(exact, wide))
        except RuntimeError:  # grouped products of experts have no float64
            true = [x.double() for x in base]
        try:
            got = _floats(run(_Called(compiled, model), inputs))
        except Exception as error:
            torch._dynamo.reset()
            try:
                run(_Called(torch.compile(model, backend="eager"), model), inputs)
            except Exception as cause:
                return {"result": "not_capturable", "reason": _line(cause)}
            return {"result": "backend_error", "reason": f"at length {length}: {_line(error)}"}
        first = first or calls
        worst = max(worst, *(_share(*each) for each in zip(got, base, true, strict=True)))
        if worst > WITHIN:
            return {"result": "wrong", "reason": f"at length {length}: {worst:.1f} times eager's error"}
    return {"result": "ok", "graphs": first, "recompiled": calls - first, "share_of_eagers_error": round(worst, 2),
            "seconds": round(time.perf_counter() - begin, 1)}  # fmt: skip


class _Called:
    """A compiled model with the signature of its original, which `run` asks for."""

    def __init__(self, call: Any, model: Any) -> None:
        self.call, self.forward = call, model.forward

    def __call__(self, **inputs: Any) -> Any:
        return self.call(**inputs)


def _floats(result: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _share(got: torch.Tensor, base: torch.Tensor, true: torch.Tensor) -> float:
    """Our largest error as a multiple of eager's; an error of a few roundings of the largest number counts as none."""
    if got.shape != true.shape or not torch.equal(got.isnan(), true.isnan()):
        return float("inf")
    known = true.abs().nan_to_num(posinf=0)
    least = 16 * torch.finfo(base.dtype).eps * float(known.max() if known.numel() else 0)
    ours, theirs = (float((x.double() - true).nan_to_num().abs().max()) if x.numel() else 0.0 for x in (got, base))
    return ours / max(theirs, least, 1e-30)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def table(known: dict[str, Any]) -> str:
    """The runs of a file as Markdown: what became of the classes, then graphs and recompilations class by class."""
    kinds = ("ok", "wrong", "backend_error", "not_capturable", "not_built", "timeout")
    lines = ["| run | " + " | ".join(kinds) + " | graphs | recompiled |", "|---|" + "---:|" * (len(kinds) + 2)]
    for key, found in known["runs"].items():
        counts = Counter(row["result"] for row in found.values())
        sums = [sum(row.get(what, 0) for row in found.values()) for what in ("graphs", "recompiled")]
        lines.append(f"| {key} | {' | '.join(str(counts[kind]) for kind in kinds)} | {sums[0]} | {sums[1]} |")
    return "\n".join(lines)


def counts(known: dict[str, Any]) -> str:
    """Graphs and recompilations of every class as Markdown, classes with the same numbers in one row."""
    runs = {name: found for name, found in known["runs"].items() if found}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in CLASSES:
        cells: tuple[str, ...] = ()
        for found in runs.values():
            row = found.get(name, {"result": "not run"})
            own = (str(row["graphs"]), str(row["recompiled"])) if row["result"] == "ok" else (row["result"], "")
            cells += own
        groups.setdefault(cells, []).append(name)
    heads = [f"{what}, {name}" for name in runs for what in ("graphs", "recompiled")]
    lines = ["| classes | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for cells, names in sorted(groups.items(), key=lambda each: -len(each[1])):
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(name.split("/")[0], []).append(name.split("/")[1])
        said = "; ".join(f"{kind}: {', '.join(each)}" for kind, each in kinds.items())
        lines.append(f"| {len(names)}: {said} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run a backend over the classes, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="graphopt")
    parser.add_argument("--classes", nargs="*", default=list(CLASSES))
    parser.add_argument("--seconds", type=int, default=120, help="limit for one class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--again", action="store_true", help="forget what the file holds of this backend")
    parser.add_argument("--table", action="store_true", help="print the file as a table and run nothing")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"lengths": LENGTHS, "runs": {}}
    if arguments.table:
        print(table(known), counts(known), sep="\n\n")
        return
    warnings.simplefilter("ignore")
    torch._logging.set_logs(all=logging.CRITICAL)
    torch.set_num_threads(1)
    found = known["runs"].setdefault(arguments.backend, {})
    if arguments.again:
        found.clear()
    for name in arguments.classes:
        if name in found:
            continue
        try:
            with limit(arguments.seconds):
                found[name] = judge(name, arguments.backend)
        except TimeoutError as error:
            found[name] = {"result": "timeout", "reason": str(error)}
        print(name, json.dumps(found[name]), flush=True)
        arguments.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
