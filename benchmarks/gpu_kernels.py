"""Every kernel that the test cases generate, on a device: right beside float64, and its time beside the roofline's.

python benchmarks/gpu_kernels.py OUT_DIRECTORY [--interpret]

Writes OUT_DIRECTORY/kernels.json. `--interpret` runs the same checks on a CPU under Triton's interpreter, without times.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphopt.backends.lowering import Options, lower_graph
from tests.backends.cases import FLOATING, drawn
from tests.backends.conftest import close, reference, trace
from tests.backends.test_products import NAMES, ROWS, inputs_of


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


def main() -> None:
    """Check everything; exits with 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--interpret", action="store_true")
    arguments = parser.parse_args()
    device = "cpu" if arguments.interpret else "cuda"
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, (function, sizes) in FLOATING.items():
            if name != "causal_mask":  # its constants are made on the CPU
                found.append(check(name, function, drawn(dtype, *sizes), device))
        for name in NAMES:
            for rows in ROWS:
                found.append(check(f"{name}_{rows}", *inputs_of(name, ROWS[rows], dtype), device))
    wrong = [each for each in found if not each["right"]]
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "copy_bytes_per_second": copy_rate() if device == "cuda" else None,
        "right": len(found) - len(wrong),
        "wrong": wrong,
        "cases": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("device", "right", "wrong")}))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
