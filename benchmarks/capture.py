"""Time of capturing a Llama shape (hidden 4096) without weights, beside plain torch.export of the same module, by stage.

    python benchmarks/capture.py                    # 8, 16 and 32 layers
    python benchmarks/capture.py --layers 4 8

CPU seconds of one thread, both in the same process and in turn, after a warm-up with two layers. The goal is a total of at
most 1.1 times plain export, growing linearly with layers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from graphopt.frontend import capture_config, export, pretrained
from graphopt.frontend.signature import model_inputs

RESULTS = Path(__file__).resolve().parent / "results" / "capture.json"
STAGES = {
    "build without weights": (pretrained, "build_without_weights"),
    "torch.export": (export, "_export_once"),
    "read guards": (export, "guarded"),
    "normalise": (export, "normalize"),
    "rebuild": (export, "_rebuild"),
    "propagate shapes": (export, "propagate"),
}


def shape(layers: int) -> Any:
    """The config of an 8-billion-parameter Llama with that many layers."""
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """CPU seconds by stage while the block runs."""
    seconds: dict[str, float] = defaultdict(float)
    originals = {name: getattr(*place) for name, place in STAGES.items()}

    def wrapped(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return originals[name](*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - begin

        return call

    for name, (module, attribute) in STAGES.items():
        setattr(module, attribute, wrapped(name))
    try:
        yield seconds
    finally:
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, originals[name])


def plain(layers: int) -> float:
    """CPU seconds of torch.export alone, with the attention that transformers picks and the same symbolic sizes."""
    config = shape(layers)
    config.use_cache = False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sizes = {dim.name: torch.export.Dim(dim.name, min=dim.low, max=dim.high) for dim in export.DEFAULT_DIMS}
    hints = {dim.name: dim.hint for dim in export.DEFAULT_DIMS}
    specs = model_inputs(model)
    inputs = {s.name: torch.zeros([hints[size] for size in s.shape], dtype=s.dtype, device="meta") for s in specs}
    dynamic = {s.name: {axis: sizes[size] for axis, size in enumerate(s.shape)} for s in specs}
    begin = time.process_time()
    with torch.no_grad():
        torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    return time.process_time() - begin


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[8, 16, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain(2), capture_config(shape(2), dtype=torch.bfloat16)
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for layers in arguments.layers:
        alone = plain(layers)
        with timed() as stages:
            begin = time.process_time()
            program = capture_config(shape(layers), dtype=torch.bfloat16)
            total = time.process_time() - begin
        row = {
            "plain export": round(alone, 2),
            "capture": round(total, 2),
            "ratio": round(total / alone, 2),
            "nodes": len(program.nodes),
            "stages": {name: round(seconds, 2) for name, seconds in stages.items()},
        }
        rows[str(layers)] = row
        print(f"{layers} layers", json.dumps(row), flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
