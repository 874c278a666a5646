"""Conversion of large checkpoints: wall time, bytes and peak memory of each, in one run, beside a copy of the files.

    python benchmarks/convert.py --shape 7b --work /big/disk [--mergekit VENV/bin/mergekit-yaml] [--flap] [--kills 10]

Makes a random bf16 checkpoint of a Llama shape (7b: Llama-2-7B, 13.5 GB in 3 shards; 1b: TinyLlama-1.1B with as many
KV heads as heads; 1b-4-layers: its first four layers; small: seconds), runs every conversion in a process of its own,
and writes benchmarks/results/convert.json. The files are copied before each conversion and at the end; times are compared
with the median of the copies. The page cache forgets the checkpoint before each, and the time ends when
all that was written is on the disk (`sync`), for the copy and for other tools alike. Peak memory is the kernel's
`ru_maxrss` of the process, bytes are its `rchar` and `wchar` (what it asked the kernel to read and write, its own code
included). `--page` writes the tables of docs/large_models.md from the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "1b-4-layers": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    },
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 16},
}
VOCABULARY = 32000
CHAIN = {
    "skip": "  - {use: skip_layers, layers: SKIPPED}\n",
    "prune": "  - {use: prune_heads, unit: kv_group, keep: 75%, score: magnitude}\n"
    "  - {use: prune_neurons, keep: 75%, score: magnitude}\n",
    "regroup": "  - {use: regroup_kv, kv_heads: heads / 4, init: mean}\n",
}
JOBS = {"skip": ("skip",), "prune": ("prune",), "regroup": ("regroup",), "chain": ("skip", "prune", "regroup")}
NAMES = {
    "copy": "copy of the files",
    "skip": "skip a quarter of the layers",
    "prune": "prune 25% of heads and of neurons by magnitude",
    "regroup": "MHA to GQA by mean, a quarter of the KV heads",
    "chain": "all three in one spec",
    "mergekit_skip": "mergekit passthrough, the same layers",
}
PAGE = Path(__file__).parent.parent / "docs" / "large_models.md"
MARKS = "<!-- figures: make convert -->\n", "<!-- end of figures -->\n"
COPY = """
import os, shutil, sys
os.makedirs(sys.argv[2])
for name in os.listdir(sys.argv[1]):
    shutil.copyfile(os.path.join(sys.argv[1], name), os.path.join(sys.argv[2], name))
"""


def main() -> None:
    """Run what was asked for and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--work", type=Path, default=Path("out/convert"))
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of a mergekit installation of its own")
    parser.add_argument("--flap", action="store_true", help="FLAP at 25%% within the memory and without a limit")
    parser.add_argument("--flap-samples", type=int, default=16)
    parser.add_argument("--kills", type=int, default=0, help="kill a conversion so often at random moments and resume")
    parser.add_argument("--estimate", action="store_true", help="also predict every conversion with graphopt plan")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert.json")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="only write the tables of the documentation")
    options = parser.parse_args()
    if options.page:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        PAGE.write_text(before + MARKS[0] + figures(options.out) + MARKS[1] + rest.partition(MARKS[1])[2])
        return
    if options.make:
        make_checkpoint(options.make, SHAPES[options.shape])
        return
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"checkpoint-{options.shape}"
    if not (checkpoint / "config.json").is_file():
        # In a process of its own: a child's peak memory begins with its parent's.
        subprocess.run([sys.executable, __file__, "--shape", options.shape, "--make", str(checkpoint)], check=True)
    found: dict[str, Any] = {"shape": options.shape, "bytes": size_of(checkpoint), "machine": machine(), "jobs": {}}
    try:
        found["jobs"] |= measure(options, checkpoint)
        if options.flap:
            found["flap"] = flap(options, checkpoint)
        if options.kills:
            found["kills"] = kills(options, checkpoint)
    finally:
        save(options.out, options.shape, found)
        if not options.keep:
            shutil.rmtree(checkpoint)
    print(json.dumps(found, indent=1))


def save(path: Path, shape: str, found: dict[str, Any]) -> None:
    """Merge the figures of one shape into the file of all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    every = json.loads(path.read_text()) if path.is_file() else {}
    before = every.get(shape, {})
    every[shape] = {**before, **found, "jobs": {**before.get("jobs", {}), **found["jobs"]}}
    path.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


def figures(results: Path) -> str:
    """The tables of all shapes in Markdown; the prediction stands in brackets behind what was measured."""
    lines: list[str] = []
    for shape, found in json.loads(results.read_text()).items():
        if found.get("jobs"):
            jobs = found["jobs"]
            loads = [job["load"] for job in jobs.values()]
            load = f"load average {min(loads)} to {max(loads)}"
            lines += ["", f"{shape}: {found['bytes'] / 1e9:.1f} GB, {found['machine']['cores']} cores, {load}.", ""]
            lines += [
                "| | seconds | times the copy | CPU seconds | GB read | GB written | peak memory, MiB |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [_row(NAMES[name], jobs[name]) for name in NAMES if name in jobs]
            if len(every := jobs["copy"].get("every", [])) > 1:
                lines += ["", f"The {len(every)} copies took {', '.join(f'{each:.0f}' for each in every)} seconds."]
        if "flap" in found:
            flap = found["flap"]
            within = ", ".join(
                f"{flap[name]['peak_memory'] >> 20} MiB and {flap[name]['cpu_seconds']:.0f} CPU seconds {text}"
                for name, text in (("limited", f"with `--memory {flap['memory']}`"), ("unlimited", "without"))
            )
            bits = "the same bits" if flap["same_bits"] else "OTHER BITS"
            lines += ["", f"FLAP at 25%, {flap['samples']} x {flap['seq']} tokens, {shape}: {within}; {bits}."]
        if "kills" in found:
            runs = found["kills"]["runs"]
            killed, same = sum(run["killed"] for run in runs), sum(run["same"] for run in runs)
            lines += [
                "",
                f"{shape}, {len(runs)} runs of which {killed} were killed and resumed: {same} equal artifacts.",
            ]
    return "\n".join(lines) + "\n\n"


def _row(name: str, job: dict[str, Any]) -> str:
    told = job.get("predicted", {})
    seconds = f"{job['seconds']:.0f}" + (f" ({told['seconds']:.0f})" if told else "")
    cells = [name, seconds, f"{job.get('times_the_copy', 1):.2f}", f"{job['cpu_seconds']:.0f}"]
    for key, unit, places in (("bytes_read", 1e9, 2), ("bytes_written", 1e9, 2), ("peak_memory", 1 << 20, 0)):
        cells.append(f"{job[key] / unit:.{places}f}" + (f" ({told[key] / unit:.{places}f})" if told else ""))
    return f"| {' | '.join(cells)} |"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"system": platform.platform(), "cores": os.cpu_count(), "memory": memory, "threads": threads}


def make_checkpoint(directory: Path, shape: dict[str, int]) -> None:
    """Random bf16 weights in 3 shards: one block of noise, turned and scaled for each tensor."""
    import torch
    from transformers import LlamaConfig

    from graphopt.artifact.tensors import Entry, write_sharded

    directory.mkdir(parents=True)
    config = LlamaConfig(architectures=["LlamaForCausalLM"], vocab_size=VOCABULARY, dtype="bfloat16", **shape)
    config.save_pretrained(directory)
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    noise = torch.randn(hidden * inner, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(shape["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        sizes |= {f"{stem}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        sizes |= {f"{stem}.mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        sizes |= {f"{stem}.mlp.down_proj.weight": (hidden, inner)}
        sizes |= {f"{stem}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        draw = random.Random(name)
        scale = draw.uniform(0.01, 0.03)
        turned = noise.roll(draw.randrange(len(noise)))
        repeats = -(-count // len(turned))
        return (turned.repeat(repeats)[:count] * scale + (len(shape) == 1)).reshape(shape).to(torch.bfloat16)

    entries = {n: Entry(s, torch.bfloat16, lambda n=n, s=s: value(n, s)) for n, s in sizes.items()}  # type: ignore[misc]
    total = sum(entry.bytes for entry in entries.values())
    write_sharded(directory, "model", entries, int(total / 3 * 1.03))


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def forget(directory: Path) -> None:
    """Let the page cache forget files, so that every job reads them from the disk."""
    os.sync()
    for path in directory.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def timed(command: list[str], checkpoint: Path, log: Path) -> dict[str, Any]:
    """Run a command to its end and to the disk; raises when it fails."""
    forget(checkpoint)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        counts = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    ended = time.perf_counter()
    os.sync()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{log.read_text()[-3000:]}")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "load": round(os.getloadavg()[0], 1),
        "seconds_before_sync": round(ended - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "bytes_read": int(counts["rchar"]),
        "bytes_written": int(counts["wchar"]),
        "peak_memory": usage.ru_maxrss * 1024,
    }


def spec_of(work: Path, name: str, steps: tuple[str, ...], layers: int) -> Path:
    """The spec of one conversion; a quarter of the layers is skipped, near the end."""
    first, count = layers - 3 - layers // 4, layers // 4
    text = "graphopt: 1\nsteps:\n" + "".join(CHAIN[step] for step in steps)
    path = work / f"{name}.yaml"
    path.write_text(text.replace("SKIPPED", f"{first}..{first + count - 1}"))
    return path


def measure(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """The copy, each conversion, and mergekit where it is given."""
    work: Path = options.work
    layers = SHAPES[options.shape]["num_hidden_layers"]
    found: dict[str, Any] = {}

    def job(name: str, command: list[str], out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        found[name] = timed(command, checkpoint, work / f"{name}.log")
        found[name]["bytes_of_result"] = size_of(out)
        shutil.rmtree(out)
        print(name, found[name], flush=True)
        save(options.out, options.shape, {"jobs": found})

    copies: list[dict[str, Any]] = []

    def copy() -> None:
        job("copy", [sys.executable, "-c", COPY, str(checkpoint), str(work / "copied")], work / "copied")
        copies.append(found["copy"])
        middle = sorted(copies, key=lambda each: float(each["seconds"]))[len(copies) // 2]
        found["copy"] = {**middle, "every": [each["seconds"] for each in copies]}

    for name in options.jobs:
        copy()
        spec = spec_of(work, name, JOBS[name], layers)
        if options.estimate:
            planned = [sys.executable, "-m", "graphopt", "plan", str(spec), "-m", str(checkpoint)]
            forget(checkpoint)
            text = subprocess.run(
                [*planned, "--estimate", "--memory", options.memory, "--json"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        out = work / f"out-{name}"
        command = [sys.executable, "-m", "graphopt", "run", str(spec), "-m", str(checkpoint), "-o", str(out)]
        job(name, [*command, "--memory", options.memory, "--json"], out)
        rows = json.loads((work / f"{name}.log").read_text())["rows"]
        certificates = [row["certificate"] for row in rows if "certificate" in row]
        found[name]["verified"] = [c.get("blocks", c.get("level")) for c in certificates]
        if options.estimate:
            found[name]["predicted"] = json.loads(text)["estimate"]
        save(options.out, options.shape, {"jobs": found})
    if options.mergekit:
        first, count = layers - 3 - layers // 4, layers // 4
        config = work / "mergekit.yaml"
        ranges = [(0, first), (first + count, layers)]
        slices = [{"sources": [{"model": str(checkpoint), "layer_range": list(each)}]} for each in ranges]
        config.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
        out = work / "out-mergekit"
        command = [str(options.mergekit), str(config), str(out), "--no-copy-tokenizer"]
        job("mergekit_skip", [*command, "--lazy-unpickle"], out)
    copy()
    for each in found.values():
        each["times_the_copy"] = round(each["seconds"] / found["copy"]["seconds"], 2)
    save(options.out, options.shape, {"jobs": found})
    return found


def flap(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """FLAP at 25% within the memory and without a limit, and whether the results have the same bits."""
    work: Path = options.work
    write = (
        "import numpy, sys; numpy.save(sys.argv[1], numpy.random.default_rng(0).integers(0, 32000, int(sys.argv[2])))"
    )
    subprocess.run([sys.executable, "-c", write, str(work / "tokens.npy"), str(options.flap_samples * 600)], check=True)
    spec = work / "flap.yaml"
    spec.write_text(
        "graphopt: 1\n"
        f"calibration: {{data: tokens.npy, samples: {options.flap_samples}, seq: 512}}\n"
        "steps:\n  - use: prune_units\n    units: [kv_group, neuron]\n    keep: 75%\n"
        "    score: {kind: fluctuation, metric: wifv}\n    allocate: global\n    compensate: mean_bias\n"
    )
    found: dict[str, Any] = {"samples": options.flap_samples, "seq": 512}
    digests = {}
    for name, extra in (("limited", ["--memory", options.memory]), ("unlimited", ["--verify", "shapes"])):
        out = work / f"flap-{name}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "graphopt", "run", str(spec), "-m", str(checkpoint), "-o", str(out)]
        found[name] = timed([*command, "--json", *extra], checkpoint, work / f"flap-{name}.log")
        # Certificates differ: the run within limits also verifies.
        digests[name] = {file: made for file, made in digest_of(out).items() if file.endswith(".safetensors")}
        shutil.rmtree(out)
        print(f"flap {name}", found[name], flush=True)
    found["memory"] = options.memory
    found["same_bits"] = digests["limited"] == digests["unlimited"]
    return found


def digest_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of an artifact; of the trail without the seconds that steps took."""
    made = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            made[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    trail = json.loads((directory / "trail.json").read_text())
    for step in trail["steps"]:
        del step["seconds"]
    made["trail.json"] = hashlib.sha256(json.dumps(trail).encode()).hexdigest()
    return made


def kills(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Kill the pruning conversion at random moments, resume it, and compare with one that ran through.

    Every third kill comes anywhere in the run, the others while shards are written.
    """
    work: Path = options.work
    spec = spec_of(work, "kills", JOBS["prune"], SHAPES[options.shape]["num_hidden_layers"])
    shards = f"save.shard_size={max(1, size_of(checkpoint) // 16)}B"
    command = [sys.executable, "-m", "graphopt", "run", str(spec), "-m", str(checkpoint), "--set", shards]
    command += ["--memory", options.memory, "--verify", "shapes"]

    def start(out: Path) -> tuple[subprocess.Popen[bytes], Path]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "-o", str(out)], **quiet), work / f".{out.name}.partial"

    def writing(child: subprocess.Popen[bytes], partial: Path) -> None:
        while child.poll() is None and not partial.is_dir():
            time.sleep(0.005)

    whole = work / "kills-whole"
    shutil.rmtree(whole, ignore_errors=True)
    started = time.perf_counter()
    child, partial = start(whole)
    writing(child, partial)
    middle = time.perf_counter()
    child.wait()
    ended = time.perf_counter()
    expected = digest_of(whole)
    shutil.rmtree(whole)
    draw, found = random.Random(0), []
    for number in range(options.kills):
        out = work / "kills-out"
        child, partial = start(out)
        if number % 3:
            writing(child, partial)
        moment = draw.uniform(0, ended - middle if number % 3 else ended - started)
        try:
            child.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        killed = child.returncode != 0
        begun = len(list(partial.glob("*.safetensors"))) if partial.is_dir() else 0
        if killed:
            start(out)[0].wait()
        same = digest_of(out) == expected and not partial.exists()
        shutil.rmtree(out)
        found.append({"after": round(moment, 3), "killed": killed, "shards_begun": begun, "same": same})
        print(number, found[-1], flush=True)
    return {
        "seconds": round(ended - started, 2),
        "shards": sum("safetensors" in name for name in expected),
        "runs": found,
    }


if __name__ == "__main__":
    main()
