"""Whole steps on a device: decoding and prefill of Llama shapes beside eager, Inductor and the bound, and transformed models.

python benchmarks/gpu_models.py OUT_DIRECTORY --part PART [--limit SECONDS] [--interpret]

Weights are random and made on the device; a shape is captured without weights. Peers run in turns in one process, times
are medians of device events, ours and Inductor's replayed as CUDA graphs. `bound_seconds` is the bytes that a step must
read (weights but the embedding's other rows, keys and values) by the rate of a large copy on the same device.
Cases that no longer fit the part's time are named as left out. Writes OUT_DIRECTORY/models_PART.json after every case.
`--interpret` runs all of it at tiny sizes on a CPU under Triton's interpreter, beside eager: figures of that say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import graphopt
from graphopt.backends import LoweredProgram, lower
from graphopt.backends.replay import cuda_graph, obstacle
from graphopt.frontend import capture_model
from graphopt.ir.program import Program
from graphopt.ir.run import bind_inputs
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}  # fmt: skip
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
# Eight layers of the 8B shape: every transformed model is compared with this one, whose layers dominate a step too.
EIGHT = LLAMA_8B | {"num_hidden_layers": 8, "vocab_size": 32000}
TINY = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}  # fmt: skip
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
# Keys and values of more than this are left to a larger device.
MOST_CACHE = 60e9
ROUNDS, CALLS = 5, 10


@dataclass(frozen=True)
class Case:
    """A step: a shape, the steps of a spec, rows of the batch, tokens of context and new tokens a row."""

    name: str
    shape: dict[str, Any]
    steps: tuple[dict[str, Any], ...] = ()
    batch: int = 1
    context: int = 2048
    tokens: int = 1
    beside: str | None = None
    """the case whose time the ratio is taken of"""


def cases(part: str) -> Iterator[Case]:
    """The cases of a part, most wanted first."""
    if part.startswith("decode"):
        shape = LLAMA_8B if part == "decode_8b" else LLAMA_1B
        for batch, context in ((1, 2048), (8, 2048), (1, 32768), (32, 2048), (8, 32768), (32, 32768)):
            yield Case(f"batch {batch}, context {context}", shape, batch=batch, context=context)
    elif part == "prefill":
        yield Case("1b, 2048 tokens", LLAMA_1B, context=0, tokens=2048)
        yield Case("8b, 2048 tokens", LLAMA_8B, context=0, tokens=2048)
    else:
        many = EIGHT | {"num_key_value_heads": 32}
        yield Case("dense", EIGHT)
        yield Case("int4", EIGHT, ({"use": "quantize", "bits": 4, "group": 64},), beside="dense")
        yield Case("heads pruned 25%", EIGHT | {"num_attention_heads": 24, "num_key_value_heads": 6}, beside="dense")
        yield Case("1 layer of 8 skipped", EIGHT | {"num_hidden_layers": 7}, beside="dense")
        yield Case("tree of 64 rows", EIGHT, tokens=64, beside="dense")
        yield Case("dense, 32k", EIGHT, batch=8, context=32768)
        for share in (50, 75):
            yield Case(f"duo {share}%, 32k", EIGHT, (duo(EIGHT, share),), batch=8, context=32768, beside="dense, 32k")
        yield Case("32 KV heads, 32k", many, batch=8, context=32768)
        yield Case("8 KV heads of 32, 32k", EIGHT, batch=8, context=32768, beside="32 KV heads, 32k")
        yield Case("8 experts, 2 chosen", EIGHT | EXPERTS)


def duo(shape: dict[str, Any], share: int) -> dict[str, Any]:
    """bound_cache with `share` percent of each layer's KV heads streaming, the others whole."""
    heads = shape["num_key_value_heads"]
    whole = tuple(range(heads - heads * share // 100))
    table = dict.fromkeys(range(shape["num_hidden_layers"]), whole)
    return {"use": "bound_cache", "sink": 64, "recent": 256, "protect": {"kind": "heads", "heads": table}}


def small(case: Case) -> Case:
    """The case at sizes that the interpreter can run."""
    shape = TINY | {key: case.shape[key] for key in EXPERTS if key in case.shape}
    if case.shape.get("num_key_value_heads") == 32:
        shape |= {"num_key_value_heads": 4}
    steps = tuple(
        duo(shape, 50) | {"sink": 2, "recent": 4} if step["use"] == "bound_cache" else {**step, "group": 8}
        for step in case.steps
    )
    context = min(case.context, 32 if case.context > 2048 else 16)
    return Case(case.name, shape, steps, min(case.batch, 2), context, min(case.tokens, 4), case.beside)


def config_of(shape: dict[str, Any], length: int) -> Any:
    """A Llama's config, or a Mixtral's where there are experts."""
    kind = transformers.MixtralConfig if "num_local_experts" in shape else transformers.LlamaConfig
    return kind(**shape, max_position_embeddings=length, attn_implementation="sdpa", use_cache=False)


def captured(case: Case) -> Program:
    """The program of a case, its weights without values but those that are computed."""
    config = config_of(case.shape, case.context + 4 * case.tokens + 64)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval().bfloat16()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    program = capture_model(model)
    steps = [*case.steps, *([{"use": "insert_cache"}] if case.context else [])]
    if not steps:
        return program
    said = parse_spec(json.dumps({"graphopt": 1, "steps": steps}), registry=PassRegistry())
    return graphopt.compile(program, said, verify="off")


class Ours:
    """A lowered program over static buffers; on a GPU its step is replayed as a CUDA graph."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, tune: bool) -> None:
        program = captured(case)
        sizes = {"B": case.batch, "S": case.tokens}
        options = {"interpret": device == "cpu", "tune": tune}
        self.lowered: LoweredProgram = lower(program, device, dtype=dtype, sizes=sizes, **options)
        self.bytes = 0
        weights = [self._weight(program, node.meta["weight"], device, dtype) for node in program.weight_nodes.values()]
        given = _inputs(program, case, device, dtype)
        bound = [x.contiguous() for x in bind_inputs(program, given, device, dtype)]
        cached = {spec.name for spec in program.entry.inputs if spec.role == "cache"}
        names = [spec.name for spec in program.entry.inputs]
        self.bytes += sum(x.nbytes for name, x in zip(names, bound, strict=True) if name in cached)
        self.arguments = [*weights, *bound]
        self.replay: Any = None
        self.waits = obstacle(self.lowered.lowered)
        if device == "cuda" and self.waits is None:
            self.replay, self.results = cuda_graph(self.step)

    def _weight(self, program: Program, name: str, device: str, dtype: torch.dtype) -> torch.Tensor:
        weight = program.weights[name]
        if weight.kind == "constant":
            return program.weights.evaluate(name, device=device)
        kind, shape = weight.expr.dtype, weight.expr.shape
        if not kind.is_floating_point:
            made = torch.randint(0, 255, shape, dtype=kind, device=device)
        else:
            kind = dtype if kind == program.dtype else kind
            made = torch.randn(shape, dtype=kind, device=device) * 0.02
        # Of a table of embeddings a step reads a row a token; a head that is tied to it reads all.
        tied = self.tied(program)
        self.bytes += 0 if "embed_tokens" in name and not tied else made.nbytes
        return made

    @staticmethod
    def tied(program: Program) -> bool:
        """Whether one weight is the embedding and the head."""
        return not any("lm_head" in name for name in program.weights.weights)

    def step(self) -> Any:
        """One step, launch by launch."""
        with torch.no_grad():
            return self.lowered.lowered(list(self.arguments))

    def __call__(self) -> Any:
        """One step."""
        if self.replay is None:
            return self.step()
        self.replay()
        return self.results

    @property
    def launches(self) -> int:
        """Kernels and library calls of a step."""
        return len(self.lowered.lowered.groups) + len(self.lowered.lowered.calls)


def _inputs(program: Program, case: Case, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tokens behind `context` held ones; room for them and the new ones in every cache that grows."""
    vocabulary = int(case.shape["vocab_size"])
    given = {"input_ids": torch.randint(0, vocabulary, (case.batch, case.tokens), device=device)}
    for spec in program.entry.inputs:
        if spec.role == "lengths":
            given[spec.name] = torch.full((case.batch,), case.context, dtype=torch.int64, device=device)
        elif spec.role == "cache":
            sizes = {"B": case.batch, "C": case.context + case.tokens}
            shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
            if spec.dtype.is_floating_point:
                given[spec.name] = torch.randn(shape, dtype=dtype, device=device)
            else:  # which token each place of a bounded cache holds: the last ones
                places = torch.arange(shape[-1], device=device) + case.context - shape[-1]
                given[spec.name] = places.to(spec.dtype).expand(shape)
    return given


class Peer:
    """The stock model with a static cache, eager or through Inductor with its CUDA graphs."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, compiled: bool) -> None:
        config = config_of(case.shape, case.context + 4096)
        config.use_cache = bool(case.context)
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                self.model = transformers.AutoModelForCausalLM.from_config(config).eval()
            finally:
                torch.set_default_dtype(before)
        self.cache: Any = None
        self.context, self.room = case.context, case.context + 1024
        self.ids = torch.randint(0, int(case.shape["vocab_size"]), (case.batch, case.tokens), device=device)
        self.batch = case.batch
        self.call = self.model.forward
        if compiled:
            self.call = torch.compile(self.model.forward, mode="max-autotune", fullgraph=True)
        self.fill()

    def fill(self) -> None:
        """An empty cache filled with `context` tokens, 2048 at a time."""
        self.steps = 0
        if not self.context:
            return
        self.cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.room)
        ids = self.ids[:, :1].expand(self.batch, self.context)
        with torch.no_grad():
            for part in ids.split(2048, 1):
                self.model(part.contiguous(), past_key_values=self.cache, logits_to_keep=1)

    def __call__(self) -> Any:
        """One step; the cache grows by its tokens."""
        self.steps += 1
        if self.context and self.steps * self.ids.shape[1] >= 1000:
            self.fill()
        extra = {"past_key_values": self.cache} if self.context else {}
        with torch.no_grad():
            return self.call(self.ids, **extra).logits


def seconds(runs: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """The median time of a call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = CALLS if device == "cuda" else 1
    for _ in range(ROUNDS if device == "cuda" else 1):
        for name, run in runs.items():
            run()
            times[name].append(_timed(run, calls, device))
    return {name: statistics.median(own) for name, own in times.items()}


def _timed(run: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cpu":
        begun = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begun) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def copy_rate() -> float:
    """Bytes a second of a copy that is larger than every cache, read and write counted."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / seconds({"copy": lambda: y.copy_(x)}, "cuda")["copy"]


def measure(
    case: Case,
    device: str,
    rate: float | None = None,
    peers: tuple[str, ...] = (),
    left: Callable[[], float] = lambda: float("inf"),
    tune: bool = False,
) -> dict[str, Any]:
    """One case: seconds of each, bytes, bound, launches; peers that the time does not allow are named."""
    found: dict[str, Any] = {"case": case.name, "batch": case.batch, "context": case.context, "tokens": case.tokens}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    begin = time.perf_counter()
    ours = Ours(case, device, dtype, tune)
    logits = ours()[0]
    runs: dict[str, Callable[[], Any]] = {"graphopt": ours}
    found |= {"build_seconds": time.perf_counter() - begin, "launches": ours.launches,
              "no_cuda_graph": ours.waits, "bytes": ours.bytes,
              "finite": bool(logits.isfinite().all()), "left_out": []}  # fmt: skip
    for peer in peers:
        if left() < 2 * found["build_seconds"]:
            found["left_out"].append(peer)
            continue
        try:
            runs[peer] = Peer(case, device, dtype, peer == "inductor")
            for _ in range(3):
                runs[peer]()
        except Exception as error:
            runs.pop(peer, None)
            found[f"{peer}_failed"] = f"{type(error).__name__}: {error}"[:300]
    found["seconds"] = seconds(runs, device)
    found["tokens_per_second"] = {name: case.batch * case.tokens / own for name, own in found["seconds"].items()}
    if rate is not None and case.context:
        found["bound_seconds"] = ours.bytes / rate
        found["share_of_bound"] = found["bound_seconds"] / found["seconds"]["graphopt"]
    return found


def main() -> None:
    """Measure one part; exits with 1 when a case fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("decode_1b", "decode_8b", "prefill", "transformed"), required=True)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds of the part")
    parser.add_argument("--tune", action="store_true", help="search block sizes by time first")
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    device = "cpu" if arguments.interpret else "cuda"
    rate = copy_rate() if device == "cuda" else None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_bytes_per_second": rate,
        "finished": False,
        "cases": [],
        "left_out": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)

    def left() -> float:
        return float(arguments.limit - (time.perf_counter() - begun))

    def store() -> None:
        (arguments.out / f"models_{arguments.part}.json").write_text(json.dumps(result, indent=1) + "\n")

    peers = () if arguments.part == "transformed" else ("eager",) if device == "cpu" else ("eager", "inductor")
    slowest, failed = 0.0, False
    for full in cases(arguments.part):
        case = small(full) if device == "cpu" else full
        heads = case.shape["num_key_value_heads"] * case.shape["head_dim"] * case.shape["num_hidden_layers"]
        cache = 4 * case.batch * case.context * heads
        if left() < slowest or cache > MOST_CACHE:
            result["left_out"].append({"case": case.name, "why": "time" if left() < slowest else "memory"})
            continue
        start = time.perf_counter()
        try:
            found = measure(case, device, rate, peers, left, arguments.tune)
        except Exception as error:
            found, failed = {"case": case.name, "error": f"{type(error).__name__}: {error}"[:500]}, True
        slowest = max(slowest, time.perf_counter() - start)
        beside = next((other for other in result["cases"] if other["case"] == case.beside), {})
        if "seconds" in found and "seconds" in beside:
            found["speed_up"] = beside["seconds"]["graphopt"] / found["seconds"]["graphopt"]
            found["byte_ratio"] = beside["bytes"] / found["bytes"]
        result["cases"].append(found)
        store()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    result["finished"] = True
    store()
    print(json.dumps({"part": arguments.part, "measured": len(result["cases"]), "left_out": len(result["left_out"])}))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
