"""Writing bundles of lowered programs; `bundle.py` says what they are, and reads them.

They are made without a device: the graph runs on tensors without data, and each launch compiles what it would run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.backends.ahead import FP_FUSION, gpu_target
from graphopt.backends.bundle import FORMAT, FUNCTIONS, WEIGHTS_FILE
from graphopt.backends.load import cache_directory
from graphopt.backends.running import LoweredProgram
from graphopt.diagnostics import PlanError
from graphopt.ir.program import specialise
from graphopt.ir.text import fingerprint


@contextlib.contextmanager
def compiling_only(target: str, cache: Path) -> Iterator[None]:
    """Within it, launches compile for `target` into `cache`, and run nothing; no device is needed."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1" if FP_FUSION else "0")
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Stub:
        def get_current_target(self) -> Any:
            return gpu_target(target)

        def get_current_device(self) -> str:
            return f"ahead {target} {cache}"

        def get_current_stream(self, device: Any) -> int:
            return 0

    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    before = (driver._active, triton.knobs.cache.dir)
    driver.set_active(Stub())
    triton.knobs.cache.dir = str(cache)
    JITFunction.run = warm
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active, triton.knobs.cache.dir = before


def save_bundle(
    made: LoweredProgram, directory: Path, target: str, sizes: Mapping[str, int], *, weights: bool = False
) -> None:
    """Write what a program was lowered to, compiled for `target` (sm_90, ..., or cpu) and for dimensions of these sizes.

    Other sizes are compiled when they come. `weights` adds the weights, in the dtype that they run in. Raises PlanError
    for a graph that holds tensors of its own, a target that is not known, or a directory that exists.
    """
    graph = made.lowered.graph
    if target != "cpu":
        gpu_target(target)
    interpreted = made.device == "cpu" and any("kernel" in node.meta for node in (graph.graph.nodes if graph else ()))
    if graph is None or interpreted or (made.device == "cpu") != (target == "cpu"):
        what = f"the program runs as {made.lowered.mode} on {made.device}, which is no bundle for {target}"
        raise PlanError.of("other_target", what, help=('lower it for "cuda", or bundle it for "cpu"',))
    if directory.exists():
        raise PlanError.of("bundle_exists", f"{directory} exists", help=("name another directory",))
    kernels = {node.meta["kernel"].digest: node.meta["kernel"] for node in graph.graph.nodes if "kernel" in node.meta}
    said = {"format": FORMAT, "target": target, "dtype": str(made.dtype), "device": made.device,
            "mode": made.lowered.mode if target == "cpu" else "Triton kernels of a bundle",
            "program": fingerprint(made.program), "packed": dict(made.packed),
            "nodes": [_say(node) for node in graph.graph.nodes]}  # fmt: skip
    scratch = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "kernels").mkdir(parents=True)
    (scratch / "triton").mkdir()
    if weights:
        said["signature"] = _save_weights(made, scratch / WEIGHTS_FILE)
    (scratch / "bundle.json").write_text(json.dumps(said, indent=1) + "\n")
    for digest, kernel in kernels.items():
        (scratch / "kernels" / f"{digest}.py").write_text(kernel.source)
    for file in cache_directory().glob("tuned_*.json"):
        if json.loads(file.read_text()).get("kernel") in kernels:
            shutil.copy(file, scratch / "kernels" / file.name)
    if target != "cpu":
        compile_all(made, target, sizes, scratch / "triton")
    scratch.replace(directory)


def _save_weights(made: LoweredProgram, file: Path) -> dict[str, Any]:
    """Write the weights that a program takes; what its call must know of it, as plain data."""
    from safetensors.torch import save_file

    program, found, places = made.program, {}, set()
    for node in program.graph.graph.nodes:
        if "weight" in node.meta:
            value = program.weights.evaluate(node.meta["weight"], made.dtype, "cpu")
            found[node.meta["weight"]] = value.clone() if value.data_ptr() in places else value
            places.add(value.data_ptr())
    save_file(found, file)
    constants = [name for name in found if program.weights[name].kind == "constant"]
    return {
        "dtype": str(program.dtype),
        "dims": [vars(dim) for dim in program.dims],
        "inputs": [{**vars(spec), "dtype": str(spec.dtype)} for spec in program.entry.inputs],
        "outputs": program.entry.outputs,
        "weights": list(found),
        "constants": constants,
    }


def compile_all(made: LoweredProgram, target: str, sizes: Mapping[str, int], cache: Path) -> None:
    """Compile what a lowered program launches at some sizes, for `target`, into a cache of Triton's; nothing runs."""
    graph = made.lowered.graph
    assert graph is not None
    with compiling_only(target, cache), torch.no_grad():
        _WithoutData(graph).run(*_empty(made, sizes))


class _WithoutData(fx.Interpreter):  # type: ignore[misc]
    """Runs a graph on tensors that have shapes alone."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        def one(value: Any) -> Any:
            return torch.device("meta") if isinstance(value, torch.device) else value

        args, kwargs = fx.node.map_aggregate(args, one), fx.node.map_aggregate(dict(kwargs), one)
        return super().call_function(target, args, kwargs)


def _empty(made: LoweredProgram, sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """The arguments of a lowered program without their data."""
    program = made.program
    inputs = {spec.name: spec for spec in program.entry.inputs}
    found = []
    for node in program.graph.graph.nodes:
        if "weight" in node.meta:
            name = node.meta["weight"]
            shape, kind = program.weights[name].expr.shape, program.weights.run_dtype(name, made.dtype)
        elif node.op == "placeholder":
            spec = inputs[node.meta["input"]]
            shape = tuple(sizes[s] if isinstance(s, str) else s for s in spec.shape)
            kind = specialise(spec.dtype, model=program.dtype, target=made.dtype, device="meta")
        else:
            continue
        found.append(torch.empty(shape, dtype=kind, device="meta"))
    return found


def _say(node: fx.Node) -> dict[str, Any]:
    """A node as plain data; raises PlanError for what a bundle cannot hold."""
    said = {"name": node.name, "op": node.op, "args": _value(node.args), "kwargs": _value(dict(node.kwargs))}
    if node.op in ("placeholder", "output"):
        return said
    if "kernel" in node.meta:
        kernel = node.meta["kernel"]
        return {**said, "kernel": kernel.digest, "template": kernel.template, "tuned": node.meta["tuned"]}
    known = {function: name for name, function in FUNCTIONS.items()}
    target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else known.get(node.target)
    if node.op != "call_function" or target is None:
        raise PlanError.of("not_bundled", f"a bundle cannot hold {node.op} of {node.target}")
    return {**said, "target": target}


def _value(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    if isinstance(value, slice):
        return {"slice": [_value(each) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, dict):
        return {"dict": {name: _value(each) for name, each in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PlanError.of("not_bundled", f"a bundle cannot hold {type(value).__name__}")
