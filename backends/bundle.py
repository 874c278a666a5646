"""A lowered program as files: a second process runs it without tracing, generating or compiling anything.

A bundle holds the graph as text, the sources of its kernels, what Triton compiled of them for one target, and chosen block
sizes. It is made without a device: the graph runs on tensors without data, and each launch compiles what it would run.
Sources and binaries are code: load only bundles that you made.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.backends.ahead import FP_FUSION, gpu_target
from graphopt.backends.autotune import Tuner, device_name, tuned
from graphopt.backends.kernel import Kernel
from graphopt.backends.load import cache_directory, callable_of
from graphopt.backends.lowering import Lowered
from graphopt.backends.programs import LoweredProgram
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program, specialise
from graphopt.ir.text import fingerprint

FORMAT = 1
_NUMBERS = {f"operator.{name}": getattr(operator, name) for name in
            ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "pow")}  # fmt: skip
_NUMBERS |= {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int")}
_NAMESPACES = ("aten", "prims", "graphopt")


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


def save_bundle(made: LoweredProgram, directory: Path, target: str, sizes: Mapping[str, int]) -> None:
    """Write what a program was lowered to, compiled for `target` (sm_90, ...) and for dimensions of these sizes.

    Other sizes are compiled when they come. Raises PlanError for a graph that holds tensors of its own, a target that is
    not known, or a directory that exists.
    """
    gpu_target(target)
    graph = made.lowered.graph
    if graph is None:
        raise PlanError.of("no_kernels", f"the program runs as {made.lowered.mode}", help=('lower it for "cuda"',))
    if directory.exists():
        raise PlanError.of("bundle_exists", f"{directory} exists", help=("name another directory",))
    said = {"format": FORMAT, "target": target, "dtype": str(made.dtype), "device": made.device,
            "program": fingerprint(made.program), "nodes": [_say(node) for node in graph.graph.nodes]}  # fmt: skip
    kernels = {node.meta["kernel"].digest: node.meta["kernel"] for node in graph.graph.nodes if "kernel" in node.meta}
    scratch = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "kernels").mkdir(parents=True)
    (scratch / "bundle.json").write_text(json.dumps(said, indent=1) + "\n")
    for digest, kernel in kernels.items():
        (scratch / "kernels" / f"{digest}.py").write_text(kernel.source)
    for file in cache_directory().glob("tuned_*.json"):
        if json.loads(file.read_text()).get("kernel") in kernels:
            shutil.copy(file, scratch / "kernels" / file.name)
    compile_all(made, target, sizes, scratch / "triton")
    scratch.replace(directory)


def load_bundle(directory: Path, program: Program) -> LoweredProgram:
    """The lowered form of a program, from a bundle that `save_bundle` wrote of the same program.

    Compiled kernels are put where Triton looks for them. Raises PlanError for another program, and for a bundle that names
    what is no op.
    """
    import triton

    said = json.loads((directory / "bundle.json").read_text())
    if said.get("format") != FORMAT or said["program"] != fingerprint(program):
        raise PlanError.of("other_program", f"{directory} was made of another program, or by another graphopt")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for each in said["nodes"]:
        known[each["name"]] = _node(graph, each, known, directory)
    module = fx.GraphModule(torch.nn.Module(), graph)
    for entry in sorted((directory / "triton").iterdir()):
        _place(entry, Path(triton.knobs.cache.dir) / entry.name)
    for file in (directory / "kernels").glob("tuned_*.json"):
        shutil.copy(file, cache_directory() / file.name)
    lowered = Lowered(module.forward, said["device"], "Triton kernels of a bundle", graph=module)
    dtype = getattr(torch, said["dtype"].removeprefix("torch."))
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    return LoweredProgram(program, lowered, said["device"], dtype, names)


def compile_all(made: LoweredProgram, target: str, sizes: Mapping[str, int], cache: Path) -> None:
    """Compile what a lowered program launches at some sizes, for `target`, into a cache of Triton's; nothing runs."""
    graph = made.lowered.graph
    assert graph is not None
    with compiling_only(target, cache), torch.no_grad():
        _WithoutData(graph).run(*_empty(made, sizes))


def _place(entry: Path, here: Path) -> None:
    """Copy one compiled kernel to where Triton looks for it; what lists its files names them by their full paths."""
    if here.exists():
        return
    scratch = here.with_name(f"{here.name}.{os.getpid()}")
    shutil.copytree(entry, scratch)
    for listing in scratch.glob("__grp__*.json"):
        files = json.loads(listing.read_text())["child_paths"]
        listing.write_text(json.dumps({"child_paths": {name: str(here / Path(name).name) for name in files}}))
    with contextlib.suppress(OSError):  # another process may have been first
        scratch.rename(here)
    shutil.rmtree(scratch, ignore_errors=True)


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
            expr = program.weights[node.meta["weight"]].expr
            shape, kind = expr.shape, expr.dtype
        elif node.op == "placeholder":
            spec = inputs[node.meta["input"]]
            shape, kind = tuple(sizes[s] if isinstance(s, str) else s for s in spec.shape), spec.dtype
        else:
            continue
        dtype = specialise(kind, model=program.dtype, target=made.dtype, device="meta")
        found.append(torch.empty(shape, dtype=dtype, device="meta"))
    return found


def _say(node: fx.Node) -> dict[str, Any]:
    """A node as plain data; raises PlanError for what a bundle cannot hold."""
    said = {"name": node.name, "op": node.op, "args": _value(node.args), "kwargs": _value(dict(node.kwargs))}
    if node.op in ("placeholder", "output"):
        return said
    if "kernel" in node.meta:
        kernel = node.meta["kernel"]
        return {**said, "kernel": kernel.digest, "template": kernel.template, "tuned": node.meta["tuned"]}
    known = {function: name for name, function in _NUMBERS.items()}
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


def _read(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(each, known) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return known[held]
    if kind == "dict":
        return {name: _read(each, known) for name, each in held.items()}
    if kind == "slice":
        return slice(*(_read(each, known) for each in held))
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, held, None)
    if kind != "torch" or not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise PlanError.of("bad_bundle", f"a bundle holds no {held!r}")
    return found


def _node(graph: fx.Graph, said: Mapping[str, Any], known: Mapping[str, fx.Node], directory: Path) -> fx.Node:
    args, kwargs = tuple(_read(said["args"], known)), _read(said["kwargs"], known)
    if said["op"] == "placeholder":
        return graph.placeholder(said["name"])
    if said["op"] == "output":
        return graph.output(*args)
    if "kernel" not in said:
        return graph.call_function(_target(said["target"]), args, kwargs)
    source = (directory / "kernels" / f"{said['kernel']}.py").read_text()
    kernel = Kernel(said["template"], source, (), (), (), ())
    if kernel.digest != said["kernel"]:
        raise PlanError.of("bad_bundle", f"the source of kernel {said['kernel']} was changed")
    run = tuned(kernel, Tuner(device_name())) if said["tuned"] else callable_of(kernel, interpret=False)
    made = graph.call_function(run, args, kwargs)
    made.meta |= {"kernel": kernel, "tuned": said["tuned"]}
    return made


def _target(name: str) -> Any:
    if name in _NUMBERS:
        return _NUMBERS[name]
    space, _, rest = name.partition(".")
    found: Any = getattr(torch.ops, space) if space in _NAMESPACES else None
    for part in rest.split("."):
        found = getattr(found, part, None) if part.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload):
        raise PlanError.of("bad_bundle", f"a bundle names {name!r}, which is no op")
    return found
