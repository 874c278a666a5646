"""Every kernel that the test cases generate, on a device: right beside float64, and its time beside the roofline's.

python benchmarks/gpu_kernels.py OUT_DIRECTORY --part PART [--interpret]

Writes OUT_DIRECTORY/kernels_PART.json. `--interpret` runs the same checks on a CPU under Triton's interpreter, without times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphopt.backends.lowering import Options, lower_graph
from graphopt.ops import attention, bounded_attention, dequantise, heavy_weights, held_attention, packed_attention
from graphopt.ops.quantised import encode, grid, pack
from tests.backends.cases import FLOATING, drawn
from tests.backends.conftest import close, reference, trace
from tests.backends.test_expert_products import biased, rows_first
from tests.backends.test_expert_products import inputs as expert_inputs
from tests.backends.test_fused_attention import over_packed, quantised
from tests.backends.test_held import POLICIES, heavy, held
from tests.backends.test_packed import GRIDS, step
from tests.backends.test_products import NAMES, ROWS, inputs_of
from tests.backends.test_taken_tokens import biased as by_last
from tests.backends.test_taken_tokens import chosen
from tests.backends.test_taken_tokens import inputs as tokens_to_take

PARTS = ("pointwise", "products", "packed", "attention", "bounded", "experts")
Case: TypeAlias = tuple[Callable[..., Any], tuple[torch.Tensor, ...]]


def seconds(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of a call by device events, after three warm-ups."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def check(name: str, function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], device: str) -> dict[str, Any]:
    """One case on a device: whether all results are within a few roundings of float64."""
    options = Options(interpret=device == "cpu", products="triton")
    here = tuple(x.to(device) for x in inputs)
    begin = time.perf_counter()
    lowered = lower_graph(trace(function, *here), device, options)
    got = lowered(list(here))
    got = got if isinstance(got, tuple | list) else (got,)
    wanted = reference(function, inputs)
    good = all(close(mine.cpu(), true) for mine, true in zip(got, wanted, strict=True))
    found = {"case": name, "dtype": str(inputs[0].dtype), "right": good, "first_call_seconds": time.perf_counter() - begin,
             "kernels": [group.name for group in lowered.groups]}  # fmt: skip
    if device == "cuda":
        found["seconds"] = seconds(lambda: lowered(list(here)))
    return found


def copy_rate() -> float:
    """Bytes a second of a copy that is larger than every cache, read and write counted."""
    x = torch.randn(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * x.itemsize / seconds(lambda: y.copy_(x))


def packed(bits: int, rows: tuple[int, ...], dtype: torch.dtype) -> Case:
    """A product whose weight is stored in `bits`, 27 by groups of 8."""
    x, values = drawn(dtype, (*rows, 27), (19, 27))
    scale, low = grid(values.float(), bits, 8)
    codes = pack(encode(values.float(), scale, low, bits, 8), bits)

    def function(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, dequantise(codes, scale, low, bits, 8, 27))

    return function, (x, codes, scale.to(dtype), low.to(dtype))


def attended(queries: int, window: int | None, softcap: float | None, dtype: torch.dtype) -> Case:
    """Causal attention of 8 heads to 2, over 301 keys."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, None, None, 0.125, True, window, softcap)

    return function, drawn(dtype, (2, 8, queries, 64), (2, 2, 301, 64), (2, 2, 301, 64))


def called(op: Any, arguments: tuple[Any, ...]) -> Case:
    """A call of an op as a function of the tensors that it is given."""

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        return op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in arguments))  # type: ignore[no-any-return]

    return function, tuple(a for a in arguments if isinstance(a, torch.Tensor))


def bounded(heads: tuple[int, ...], dtype: torch.dtype) -> Case:
    """A text of 150 tokens of which some KV heads see the first 3 and the last 20."""
    q, k, v = drawn(dtype, (2, 6, 150, 64), (2, 2, 150, 64), (2, 2, 150, 64))
    rest = (None, None, 0.3, True, None, None, None, None, list(heads), 3, 20, 0, False)
    return called(bounded_attention, (q, k, v, *rest))


def cases(part: str, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """The cases of a part by name."""
    if part == "pointwise":
        for name, (function, sizes) in FLOATING.items():
            if name != "causal_mask":  # its constants are made on the CPU
                yield name, (function, drawn(dtype, *sizes))
    elif part == "products":
        for name in NAMES:
            for rows in ROWS:
                yield f"{name}_{rows}", inputs_of(name, ROWS[rows], dtype)
    elif part == "packed":
        for bits in (1, 2, 3, 4, 8):
            for rows in ROWS:
                yield f"packed_{bits}_{rows}", packed(bits, ROWS[rows], dtype)
    elif part == "bounded":
        for policy in POLICIES:
            for count in (1, 4):
                yield f"held_{policy}_{count}", called(held_attention, held(policy, count, dtype))
        yield "heavy", called(heavy_weights, heavy(dtype))
        for heads in ((0, 1), (1,)):
            yield f"text_{len(heads)}", bounded(heads, dtype)
        for queries in (1, 4):
            yield f"packed_cache_{queries}", (over_packed, quantised(queries, dtype))
        for grid in GRIDS:
            for count in (1, 4):
                yield f"quantised_cache_{grid}_{count}", called(packed_attention, step(grid, count, dtype))
        for name, function in (("chosen", chosen), ("chosen_step", by_last)):
            yield name, (function, tokens_to_take(dtype))
    elif part == "experts":
        for function in (rows_first, biased):
            for count in (1, 3, 71):
                yield f"{function.__name__}_{count}", (function, expert_inputs(count, dtype))
    else:
        for queries in (1, 37, 301):
            for window, softcap in ((None, None), (64, None), (None, 20.0)):
                yield f"attention_{queries}_{window}_{softcap}", attended(queries, window, softcap, dtype)


def main() -> None:
    """Check one part; exits with 1 when a result is wrong or a case fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.interpret else "cuda"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_rate() if device == "cuda" else None,
        "finished": False,
        "cases": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)

    def store() -> None:
        (arguments.out / f"kernels_{arguments.part}.json").write_text(json.dumps(result, indent=1) + "\n")

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (function, inputs) in cases(arguments.part, dtype):
            try:
                found = check(name, function, inputs, device)
            except Exception as error:
                found = {"case": name, "dtype": str(dtype), "right": False, "error": f"{type(error).__name__}: {error}"}
            result["cases"].append(found)
            store()
    result["finished"] = True
    store()
    wrong = [each["case"] for each in result["cases"] if not each["right"]]
    print(json.dumps({"part": arguments.part, "right": len(result["cases"]) - len(wrong), "wrong": wrong}))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
