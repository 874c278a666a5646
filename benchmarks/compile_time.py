"""Compile time, calls and CPU latency of `torch.compile(backend="graphopt")` beside eager, Inductor and ONNX Runtime.

python benchmarks/compile_time.py --part PART   (latency | compile | overhead; each takes minutes)
python benchmarks/compile_time.py --page             (docs/backend_speed.md from the JSON)

Models are Llamas with random weights in float32, one thread. Every peer runs in a process of its own, because runtimes in
one process disturb each other; times are medians, taken in turns between the processes.
Writes benchmarks/results/compile_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/compile_time.json"
PAGE = ROOT / "docs/backend_speed.md"
SHAPES = ((1, 64), (8, 128))
PEERS = {
    "eager": {},
    "graphopt": {"backend": "graphopt"},
    "graphopt, lower(program)": {},
    "graphopt, cpu: inductor": {"backend": "graphopt", "options": {"cpu": "inductor"}},
    "aot_eager": {"backend": "aot_eager"},
    "inductor": {"backend": "inductor"},
    "onnxruntime": {},
}
# With "eager" as its backend torch.compile does nothing but capture: what the others add to that is their own.
FIRST_CALLS = {
    "dynamo": {"backend": "eager"},
    "graphopt": PEERS["graphopt"],
    "graphopt, bundle": {},
    "inductor": PEERS["inductor"],
}
ROUNDS, CALLS = 7, 12
DEPTHS = (4,)


def llama(layers: int, small: bool = False) -> Any:
    """A Llama of 256 features (or 32, where only the calls around the work are timed)."""
    import torch
    import transformers

    torch.manual_seed(0)
    width = 32 if small else 256
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=width * 43 // 16, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(shape: tuple[int, int]) -> Any:
    """Tokens from a fixed seed."""
    import torch

    return torch.randint(0, 2048, shape, generator=torch.Generator().manual_seed(1))


def runner(peer: str, model: Any, directory: Path) -> Any:
    """What takes tokens and returns logits."""
    import torch

    if peer == "onnxruntime":
        import onnxruntime

        path = str(directory / "model.onnx")
        batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
        torch.onnx.export(
            alone_with_logits(model),
            (tokens((3, 19)),),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length},),
            verbose=False,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])
    if peer == "graphopt, lower(program)":
        from graphopt.backends import lower
        from graphopt.frontend import capture_model

        lowered = lower(capture_model(model), "cpu")
        return lambda ids: lowered(input_ids=ids)[0]
    function = model if peer == "eager" else torch.compile(model, dynamic=True, **PEERS[peer])
    return lambda ids: function(ids).logits


def alone_with_logits(model: Any) -> Any:
    """The model as a module that returns logits alone."""
    import torch

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids=input_ids).logits

    return Alone()


def serve(peer: str) -> None:
    """A process of one peer: builds, then times calls of a shape whenever it is asked on standard input."""
    import torch

    torch.set_num_threads(1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        model = llama(4)
        started = time.perf_counter()
        run = runner(peer, model, Path(directory))
        run(tokens((3, 19)))
        build = time.perf_counter() - started
        for shape in SHAPES:
            run(tokens(shape))
        far = [float((run(tokens(s)) - model(tokens(s)).logits).abs().max()) for s in SHAPES]
        print(json.dumps({"build_seconds": build, "largest_difference": max(far)}), flush=True)
        for line in sys.stdin:
            ids = tokens(tuple(json.loads(line)))
            run(ids)
            times = []
            for _ in range(CALLS):
                begin = time.process_time()
                run(ids)
                times.append(time.process_time() - begin)
            print(json.dumps(times), flush=True)


def latency(peers: Sequence[str]) -> dict[str, Any]:
    """Medians for each peer and shape, the peers in turns; `ratio` is the median over rounds of eager's time to theirs."""
    processes, found = {}, {}
    for peer in peers:
        process = subprocess.Popen([sys.executable, __file__, "--serve", peer], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
        first = _answer(process)
        if first is None:
            errors = [line for line in process.stderr.read().splitlines() if "Error" in line]
            found[peer] = {"failed": errors[-1:]}
        else:
            processes[peer], found[peer] = process, first
    for shape in SHAPES:
        times: dict[str, list[float]] = {peer: [] for peer in processes}
        for _ in range(ROUNDS):
            for peer, process in processes.items():
                process.stdin.write(json.dumps(shape) + "\n")
                process.stdin.flush()
                times[peer].append(statistics.median(_answer(process)))
        for peer, own in times.items():
            ratios = [base / mine for base, mine in zip(times["eager"], own, strict=True)]
            found[peer][str(list(shape))] = {"seconds": statistics.median(own), "ratio": statistics.median(ratios)}
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def _answer(process: Any) -> Any:
    """The next line of JSON; other output is passed over. None when the process ends."""
    for line in process.stdout:
        if line.startswith(("{", "[")):
            return json.loads(line)
    return None


def first_call(peer: str, layers: int, directory: Path) -> None:
    """Print how long the first call takes; a bundle is written into `directory`, or called from there."""
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        ids = tokens((3, 19))
        if peer == "graphopt, bundle":
            print(json.dumps({"seconds": bundled(layers, ids, directory / "bundle")}))
            return
        model = llama(layers)
        model(ids)
        begin = time.perf_counter()
        torch.compile(model, dynamic=True, **FIRST_CALLS[peer])(ids)
        print(json.dumps({"seconds": time.perf_counter() - begin}))


def bundled(layers: int, ids: Any, directory: Path) -> float:
    """Seconds to the first result: from a bundle where there is one, else from a model, writing the bundle included."""
    if directory.is_dir():
        begin = time.perf_counter()
        from graphopt.backends.bundle import load_bundle

        load_bundle(directory)(input_ids=ids)
        return time.perf_counter() - begin
    model = llama(layers)
    model(ids)
    begin = time.perf_counter()
    from graphopt.backends import lower
    from graphopt.backends.bundler import save_bundle
    from graphopt.frontend import capture_model

    lowered = lower(capture_model(model), "cpu")
    lowered(input_ids=ids)
    save_bundle(lowered, directory, "cpu", {}, weights=True)
    return time.perf_counter() - begin


def compile_times() -> dict[str, Any]:
    """The first call with empty and with filled caches; each in a fresh process, whose whole time counts, too."""
    found: dict[str, Any] = {}
    for peer in FIRST_CALLS:
        for layers in DEPTHS:
            with tempfile.TemporaryDirectory() as cache:
                extra = {"TORCHINDUCTOR_CACHE_DIR": cache, "GRAPHOPT_CACHE": f"{cache}/graphopt"}
                command = [
                    sys.executable,
                    __file__,
                    "--first-call",
                    peer,
                    "--layers",
                    str(layers),
                    "--directory",
                    cache,
                ]
                times: list[float] = []
                for _ in ("cold", "warm"):
                    begin = time.perf_counter()
                    done = subprocess.run(command, env=os.environ | extra, capture_output=True, text=True, timeout=300)
                    times += [_read(done)["seconds"], time.perf_counter() - begin]
            names = ("cold_seconds", "cold_process_seconds", "warm_seconds", "warm_process_seconds")
            found.setdefault(peer, {})[str(layers)] = dict(zip(names, times, strict=True))
    return found


def _read(done: subprocess.CompletedProcess[str]) -> Any:
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr)
    return json.loads(lines[-1])


def once(graph: Any) -> Any:
    """What returns the results of its first call: all that is left of further ones is around the work."""
    held: list[Any] = []

    def run(*arguments: Any) -> Any:
        if not held:
            held.append(graph.forward(*arguments))
        return held[0]

    return run


def call_time(way: str) -> None:
    """Print the median time of a call whose work was done before, at 32 small layers."""
    import torch

    from graphopt.backends import lower
    from graphopt.compiler import dynamo
    from graphopt.frontend import capture_model

    torch.set_num_threads(1)
    model, ids = llama(32, small=True), tokens((1, 8))
    dynamo.direct = once
    with torch.no_grad():
        if way == "lower(program)":
            lowered = lower(capture_model(model), "cpu")
            lowered.lowered.run = once(lowered.lowered.graph)

            def run() -> Any:
                return lowered(input_ids=ids)
        else:

            def alone(graph: Any, inputs: Any, **_: Any) -> Any:
                return once(graph)

            options = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
            backend: Any = alone if way.startswith("Dynamo") else "graphopt"
            compiled = torch.compile(model, backend=backend, options=options if "module" in way else None)

            def run() -> Any:
                return compiled(ids)

        times = []
        for call in range(450):
            begin = time.perf_counter()
            run()
            if call >= 50:
                times.append(time.perf_counter() - begin)
    print(json.dumps({"microseconds": 1e6 * statistics.median(times)}))


WAYS = ("Dynamo", "graphopt", "Dynamo, module guards off", "graphopt, module guards off", "lower(program)")


def overhead() -> dict[str, Any]:
    """The time around the work of a call, each way in a process of its own, twice in turns; the lower median counts."""
    found: dict[str, float] = {}
    for way in WAYS * 2:
        done = subprocess.run(
            [sys.executable, __file__, "--call-time", way], capture_output=True, text=True, timeout=200
        )
        found[way] = min(found.get(way, 1e9), _read(done)["microseconds"])
    return {way: {"microseconds": round(own, 1)} for way, own in found.items()}


def page(known: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Compile time, calls and CPU latency",
        "",
        "Written by `python benchmarks/compile_time.py --page` from benchmarks/results/compile_time.json: Llamas with random",
        "weights, 256 features, float32, one thread, on two shared cores of a cloud machine that other work used too. On a",
        "CPU graphopt's default is Dynamo's own graph with fewer and faster library calls. No GPU ran any of this.",
    ]
    if "latency" in known:
        lines += ["", "## Latency, 4 layers", "", "Seconds of processor time a call and how many times faster than eager,",
                  "medians, peers in turns, each in its own process. Build is the first call with caches as they",
                  "were, for ONNX Runtime its export.",
                  "What is of an earlier run says so; its ratios are beside the eager of that run.",
                  "", "| | (1, 64) | | (8, 128) | | largest difference | build |",
                  "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        for peer, own in known["latency"].items():
            if "failed" in own:
                lines.append(f"| {peer} | failed: {' '.join(own['failed'])[:90]} | | | | | |")
                continue
            peer += ", an earlier run" if own.get("earlier") else ""
            cells = [f"{own[str(list(s))]['seconds'] * 1e3:.2f} ms | {own[str(list(s))]['ratio']:.2f}x" for s in SHAPES]
            lines.append(
                f"| {peer} | {' | '.join(cells)} | {own['largest_difference']:.0e} | {own['build_seconds']:.1f} s |"
            )
    if "compile" in known:
        lines += [
            "",
            "## First call",
            "",
            "Seconds to the first result of a Llama of 4 layers in a fresh process that has torch and the model;",
            "`warm` is a second process with the caches of the first, `whole` all of that process, imports of torch and of",
            'transformers, the model and the end included. `dynamo` captures and does nothing else (`backend="eager"`): no',
            "backend of `torch.compile` can be below it. A bundle with weights is written by the first process and needs no",
            "model in the second; its seconds include the import of graphopt. Rows of an earlier run, when less else ran on",
            "the machine, compare with each other alone.",
            "",
            "| | cold | whole | warm | whole |",
            "|---|---:|---:|---:|---:|",
        ]
        for peer, own in known["compile"].items():
            kinds = ("cold", "cold_process", "warm", "warm_process")
            cells = [own[str(n)].get(f"{kind}_seconds") for n in DEPTHS for kind in kinds]
            lines.append(f"| {peer} | {' | '.join('' if cell is None else f'{cell:.2f}' for cell in cells)} |")
    if "overhead" in known:
        lines += ["", "## Around a call, 32 layers", "", "Microseconds of a call whose work was done before. What",
                  "`torch.compile` takes is Dynamo's checks of the model; `options={\"guard_filter_fn\":",
                  "torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}` leaves out those of modules that never change.",
                  "", "| | us |", "|---|---:|"]  # fmt: skip
        lines += [f"| {way} | {own['microseconds']:.0f} |" for way, own in known["overhead"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one part and add it to the results, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("latency", "compile", "overhead"))
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help="these, eager among them, join what is stored")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--call-time", help=argparse.SUPPRESS)
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    elif arguments.call_time:
        call_time(arguments.call_time)
    elif arguments.first_call:
        first_call(arguments.first_call, arguments.layers, arguments.directory)
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if arguments.part:
        import torch

        parts = {"latency": lambda: latency(arguments.peers), "compile": compile_times, "overhead": overhead}
        made = parts[arguments.part]()
        known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        known["torch"] = torch.__version__
        if arguments.part == "latency" and len(made) < len(PEERS):
            # Ratios hold beside the eager of their own run, which is the one that is stored.
            made = {**known.get("latency", {}), **made}
        known[arguments.part] = made
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if arguments.page:
        PAGE.write_text(page(known))


if __name__ == "__main__":
    main()
