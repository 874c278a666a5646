"""Attention and products of experts alone on a device: ours beside FlexAttention, torch's attention and its grouped GEMM.

python benchmarks/gpu_steps.py OUT_DIRECTORY [--limit SECONDS] [--interpret]

Attention is of Llama-3.1-8B's heads in bf16: a step over 32k tokens, a whole text of 8k, each with all heads whole and with
half or three quarters of the KV heads held to the first 64 and the last 256 tokens (DuoAttention). Experts are 8, of which
a token takes 2. Every result is compared with float64 on the first and the last KV head, or the first rows. Times are
medians of device events, in turns in one process; `share_of_bound` is that of the bytes by the rate of a large copy.
Cases that no longer fit the time are named. Writes OUT_DIRECTORY/steps.json after every case; `--interpret` runs all of it
at tiny sizes on a CPU, peers uncompiled: times of that say nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_models import copy_rate, seconds
from graphopt.backends.lowering import Options, lower_graph
from graphopt.ops import attention, bounded_attention
from tests.backends.conftest import close, trace

Tensor = torch.Tensor


@dataclass(frozen=True)
class Sizes:
    """What is measured on a device, and what an interpreter can run."""

    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    context: int = 32768
    text: int = 8192
    sink: int = 64
    recent: int = 256
    experts: int = 8
    hidden: int = 4096
    inner: int = 14336
    rows: tuple[int, ...] = (1, 32, 2048)


TINY = Sizes(2, 4, 4, 16, 64, 48, 2, 8, 4, 32, 40, (1, 20))


@dataclass
class Case:
    """One step: what computes it, by name, ours first; which of its results is compared with `reference`, in float64."""

    name: str
    runs: dict[str, Callable[[], Any]]
    compared: Callable[[Any], Tensor]
    reference: Callable[[], Tensor]
    bytes: int | None = None
    """what a step must move, where that bounds it"""
    beside: str | None = None
    """the case whose time of ours the speed-up is taken of"""
    failed: dict[str, str] = field(default_factory=dict)


class Maker:
    """Makes the cases on a device; peers that torch does not have there are named in the case."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.scale = sizes.width**-0.5

    def cases(self) -> Iterator[Callable[[], Case]]:
        """Builders of the cases, most wanted first."""
        for share in (0, 50, 75):
            yield lambda share=share: self.step(share)
        for rows in self.sizes.rows:
            yield lambda rows=rows: self.expert_products(rows)
        for share in (0, 50, 75):
            yield lambda share=share: self.whole_text(share)

    def drawn(self, *shape: int) -> Tensor:
        """Random numbers of a fixed seed."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

    def ours(self, function: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
        """A function as generated kernels."""
        made = lower_graph(trace(function, *inputs, dynamic=-1), self.device, Options(interpret=self.device == "cpu"))
        return lambda: made(list(inputs))

    def bounded(self, share: int) -> int:
        """How many of the KV heads, the last ones, are bounded."""
        return self.sizes.kv_heads * share // 100

    def step(self, share: int) -> Case:
        """One token a row over a long context; bounded heads keep their entries alone."""
        s, few = self.sizes, self.bounded(share)
        group, whole, held = s.heads // s.kv_heads, s.kv_heads - few, s.sink + s.recent
        q = self.drawn(s.batch, s.heads, 1, s.width)
        k, v = (self.drawn(s.batch, s.kv_heads, s.context, s.width) for _ in range(2))
        first = (q[:, : whole * group].contiguous(), k[:, :whole].contiguous(), v[:, :whole].contiguous())
        kept = [torch.cat([x[:, whole:, : s.sink], x[:, whole:, -s.recent :]], 2).contiguous() for x in (k, v)]
        last = (q[:, whole * group :].contiguous(), *kept)

        def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, None, None, self.scale, True, None, None)

        parts = [self.ours(alone, *each) for each in (first, last) if each[0].shape[1]]
        entries = whole * s.context + few * held
        made = Case(
            f"attention of a token, {share}% of the heads bounded",
            {"graphopt": lambda: [part() for part in parts]},
            lambda results: self.ends(torch.cat(_tensors(results), 1)),
            lambda: self.attended(q, k, v, self.visible(whole, 1, s.context)),
            2 * s.batch * entries * s.width * k.element_size(),
            beside=f"attention of a token, {0}% of the heads bounded" if share else None,
        )
        self.peers(made, q, k, v, whole, share)
        return made

    def whole_text(self, share: int) -> Case:
        """Causal attention over a text; bounded heads see its first tokens and the last before each."""
        s, few = self.sizes, self.bounded(share)
        whole = s.kv_heads - few
        q = self.drawn(1, s.heads, s.text, s.width)
        k, v = (self.drawn(1, s.kv_heads, s.text, s.width) for _ in range(2))
        heads = list(range(whole, s.kv_heads))

        def text(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not heads:
                return attention(q, k, v, None, None, self.scale, True, None, None)
            rest = (None, None, self.scale, True, None, None, None, None, heads, s.sink, s.recent, 0, False)
            return bounded_attention(q, k, v, *rest)

        made = Case(
            f"attention of a text, {share}% of the heads bounded",
            {"graphopt": self.ours(text, q, k, v)},
            lambda result: self.ends(_tensors(result)[0])[:, :, -64:],
            lambda: self.attended(q[:, :, -64:], k, v, self.visible(whole, min(64, s.text), s.text)),
            beside=f"attention of a text, {0}% of the heads bounded" if share else None,
        )
        self.peers(made, q, k, v, whole, share)
        return made

    def visible(self, whole: int, queries: int, keys: int) -> Tensor:
        """Which keys the last queries of each KV head see, `[K, S, T]`."""
        s = self.sizes
        rows = torch.arange(keys - queries, keys, device=self.device)[:, None]
        columns = torch.arange(keys, device=self.device)[None]
        near = (columns < s.sink) | (columns > rows - s.recent)
        bounded = torch.arange(s.kv_heads, device=self.device)[:, None, None] >= whole
        return (columns <= rows) & (near | ~bounded)

    def ends(self, result: Tensor) -> Tensor:
        """The query heads of the first and of the last KV head."""
        group = self.sizes.heads // self.sizes.kv_heads
        return torch.cat([result[:1, :group], result[:1, -group:]], 1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """The same heads of the first row in float64."""
        group, found = self.sizes.heads // self.sizes.kv_heads, []
        for head in (0, -1):
            mine = q[:1, :group] if head == 0 else q[:1, -group:]
            logits = mine.double() @ k[:1, head, None].double().mT * self.scale
            weights = logits.masked_fill(~seen[head], float("-inf")).softmax(-1)
            found.append(weights @ v[:1, head, None].double())
        return torch.cat(found, 1)

    def peers(self, made: Case, q: Tensor, k: Tensor, v: Tensor, whole: int, share: int) -> None:
        """FlexAttention with the mask of the heads, and torch's attention where all heads are whole."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        s, group = self.sizes, self.sizes.heads // self.sizes.kv_heads
        behind = k.shape[2] - q.shape[2]

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            row = i + behind
            near = (j < s.sink) | (j > row - s.recent)
            return (j <= row) & (near | (h // group < whole))

        def flex() -> Callable[[], Any]:
            # A token sees all keys where every head is whole: no mask is the fastest that FlexAttention has.
            masked = bool(share) or q.shape[2] > 1
            blocks = (
                create_block_mask(mask, None, s.heads, q.shape[2], k.shape[2], device=self.device) if masked else None
            )
            call = torch.compile(flex_attention, dynamic=False) if self.device == "cuda" else flex_attention
            return lambda: call(q, k, v, block_mask=blocks, scale=self.scale, enable_gqa=s.heads != s.kv_heads)

        self.add(made, "flex_attention", flex)
        if not share:
            causal, gqa = q.shape[2] > 1, s.heads != s.kv_heads
            self.add(made, "scaled_dot_product_attention", lambda: lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=self.scale, enable_gqa=gqa))  # fmt: skip

    def expert_products(self, rows: int) -> Case:
        """Rows times the matrices of the experts that each chose; the grouped GEMM's rows are put in order within its time."""
        s = self.sizes
        x, bank = self.drawn(rows, s.hidden), self.drawn(s.experts, s.inner, s.hidden) * 0.02
        generator = torch.Generator(self.device).manual_seed(rows)
        draws = torch.rand(rows, s.experts, generator=generator, device=self.device)
        experts = draws.topk(2).indices

        def routed(x: Tensor, bank: Tensor, experts: Tensor) -> Tensor:
            pairs = x[:, None].expand(-1, 2, -1).reshape(-1, s.hidden)
            return torch.bmm(bank[experts.reshape(-1)], pairs[..., None])[..., 0]

        def grouped() -> Callable[[], Any]:
            multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
            columns = bank.mT

            def run() -> Tensor:
                chosen = experts.reshape(-1)
                order = chosen.argsort(stable=True)
                ends = torch.bincount(chosen, minlength=s.experts).cumsum(0).to(torch.int32)
                product = multiply(x[order // 2], columns, offs=ends)
                return torch.empty_like(product).index_copy(0, order, product)

            return run

        few = experts[:16].reshape(-1)
        made = Case(
            f"products of {rows} tokens with 2 of {s.experts} experts",
            {"graphopt": self.ours(routed, x, bank, experts)},
            lambda result: _tensors(result)[0][: len(few)],
            lambda: torch.stack(
                [bank[e].double() @ x[i // 2].double() for i, e in enumerate(few.tolist())]
            ),
            int(experts.unique().numel()) * s.inner * s.hidden * x.element_size() if rows <= 32 else None,
        )  # fmt: skip
        self.add(made, "grouped_mm", grouped)
        return made

    def add(self, made: Case, name: str, build: Callable[[], Callable[[], Any]]) -> None:
        """A peer that runs once; what torch cannot do here is named with its reason."""
        try:
            run = build()
            run()
            made.runs[name] = run
        except Exception as error:
            made.failed[name] = f"{type(error).__name__}: {error}"[:300]


def _tensors(result: Any) -> list[Tensor]:
    """Tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for each in result for tensor in _tensors(each)]


def measure(made: Case, device: str, rate: float | None) -> dict[str, Any]:
    """One case: whether each result is right, seconds of each, and the share of the bound."""
    wanted = made.reference()
    right = {name: bool(close(made.compared(run()), wanted)) for name, run in made.runs.items()}
    found: dict[str, Any] = {"case": made.name, "right": right, "failed": made.failed, "bytes": made.bytes}
    found["seconds"] = seconds(made.runs, device)
    if rate is not None and made.bytes is not None:
        found["share_of_bound"] = {name: made.bytes / rate / own for name, own in found["seconds"].items()}
    return found


def main() -> None:
    """Measure all cases; exits with 1 when a result of ours is wrong or a case fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of the whole")
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    begun, device = time.perf_counter(), "cpu" if arguments.interpret else "cuda"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_rate() if device == "cuda" else None,
        "finished": False,
        "cases": [],
        "left_out": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)

    def store() -> None:
        (arguments.out / "steps.json").write_text(json.dumps(result, indent=1) + "\n")

    slowest, failed = 0.0, False
    for position, build in enumerate(Maker(TINY if device == "cpu" else Sizes(), device).cases()):
        if arguments.limit - (time.perf_counter() - begun) < slowest:
            result["left_out"].append({"case": position, "why": "time"})
            continue
        start = time.perf_counter()
        try:
            with torch.no_grad():
                made = build()
                found = measure(made, device, result["copy_bytes_per_second"])
            beside = next((other for other in result["cases"] if other["case"] == made.beside), None)
            if beside is not None and "seconds" in beside:
                found["speed_up"] = beside["seconds"]["graphopt"] / found["seconds"]["graphopt"]
                if made.bytes is not None:
                    found["byte_ratio"] = beside["bytes"] / made.bytes
            failed |= not found["right"]["graphopt"]
        except Exception as error:
            found, failed = {"case": str(position), "error": f"{type(error).__name__}: {error}"[:500]}, True
        slowest = max(slowest, time.perf_counter() - start)
        result["cases"].append(found)
        store()
        if device == "cuda":
            made = None  # type: ignore[assignment]
            torch.cuda.empty_cache()
    result["finished"] = True
    store()
    print(json.dumps({"part": "steps", "measured": len(result["cases"]), "left_out": len(result["left_out"])}))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
