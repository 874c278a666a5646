"""A lowered program as files: a second process runs it without tracing, generating or compiling anything.

A bundle holds the graph as text, the sources of its kernels, what Triton compiled of them for one target, and chosen block
sizes; for a CPU it holds library calls. With the weights in it, a second process needs no model and captures nothing.
`bundler.py` writes bundles. Sources and binaries are code: load only bundles that you made.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.backends import library
from graphopt.backends.running import Lowered, LoweredProgram
from graphopt.diagnostics import PlanError
from graphopt.ir.expressions import Source
from graphopt.ir.program import Dim, Entry, Input, Program
from graphopt.ir.weights import MemorySource, Weight, WeightStore

FORMAT = 2
WEIGHTS_FILE = "weights.safetensors"
FUNCTIONS: dict[str, Any] = {f"operator.{name}": getattr(operator, name) for name in
            ("add", "sub", "mul", "floordiv", "mod", "neg", "getitem", "pow")}  # fmt: skip
FUNCTIONS |= {f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int")}
FUNCTIONS |= {f"library.{name}": getattr(library, name)
              for name in ("attend", "gain_norm", "product", "product_with", "rotate", "visible")}  # fmt: skip
_NAMESPACES = ("aten", "prims", "graphopt")


def load_bundle(directory: Path, program: Program | None = None) -> LoweredProgram:
    """The lowered form of a program, from a bundle that `save_bundle` wrote of the same program.

    A bundle with weights needs no program. Compiled kernels are put where Triton looks for them. Raises PlanError for
    another program, a bundle without weights where none is given, and for one that names what is no op.
    """
    said = json.loads((directory / "bundle.json").read_text())
    if said.get("format") != FORMAT or (program is not None and not _made_of(said, program)):
        raise PlanError.of("other_program", f"{directory} was made of another program, or by another graphopt")
    if program is None:
        program = _signature(directory, said)
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for each in said["nodes"]:
        known[each["name"]] = _node(graph, each, known, directory)
    module = fx.GraphModule(torch.nn.Module(), graph)
    if said["target"] != "cpu":
        _place_all(directory)
    lowered = Lowered(module.forward, said["device"], said["mode"], graph=module)
    return LoweredProgram(program, lowered, said["device"], _dtype(said["dtype"]), {}, said["packed"])


def _made_of(said: Mapping[str, Any], program: Program) -> bool:
    from graphopt.ir.text import fingerprint

    return bool(said["program"] == fingerprint(program))


def _signature(directory: Path, bundle: Mapping[str, Any]) -> Program:
    """A program that is called as the one of a bundle is: with its weights and inputs, and without its nodes."""
    from safetensors.torch import load_file

    said = bundle.get("signature")
    if said is None:
        raise PlanError.of(
            "no_weights", f"{directory} holds no weights", help=("pass the program that it was made of",)
        )
    tensors = load_file(directory / WEIGHTS_FILE)
    weights = {}
    graph = fx.Graph()
    for name in said["weights"]:
        value = tensors[name]
        kind: Any = "constant" if name in said["constants"] else "parameter"
        weights[name] = Weight(name, Source(name, tuple(value.shape), value.dtype), kind=kind)
        graph.placeholder(f"weight_{len(weights)}").meta["weight"] = name
    inputs = []
    for each in said["inputs"]:
        inputs.append(Input(each["name"], tuple(each["shape"]), _dtype(each["dtype"]), each["role"]))
        graph.placeholder(each["name"]).meta["input"] = each["name"]
    graph.output(())
    return Program(
        fx.GraphModule(torch.nn.Module(), graph),
        WeightStore(weights, MemorySource(tensors)),
        tuple(Dim(**dim) for dim in said["dims"]),
        Entry(tuple(inputs), tuple(said["outputs"])),
        _dtype(said["dtype"]),
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise PlanError.of("bad_bundle", f"a bundle names {name!r}, which is no dtype")
    return found


def _place_all(directory: Path) -> None:
    """Put compiled kernels and chosen sizes where they are looked for."""
    import triton

    from graphopt.backends.load import cache_directory

    for entry in sorted((directory / "triton").iterdir()):
        _place(entry, Path(triton.knobs.cache.dir) / entry.name)
    for file in (directory / "kernels").glob("tuned_*.json"):
        shutil.copy(file, cache_directory() / file.name)


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
    # Imported for kernels alone: they take longer than a bundle of library calls does to its first result.
    from graphopt.backends.autotune import Tuner, device_name, tuned
    from graphopt.backends.kernel import Kernel
    from graphopt.backends.load import callable_of

    source = (directory / "kernels" / f"{said['kernel']}.py").read_text()
    kernel = Kernel(said["template"], source, (), (), (), ())
    if kernel.digest != said["kernel"]:
        raise PlanError.of("bad_bundle", f"the source of kernel {said['kernel']} was changed")
    run = tuned(kernel, Tuner(device_name())) if said["tuned"] else callable_of(kernel, interpret=False)
    made = graph.call_function(run, args, kwargs)
    made.meta |= {"kernel": kernel, "tuned": said["tuned"]}
    return made


def _target(name: str) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    space, _, rest = name.partition(".")
    found: Any = getattr(torch.ops, space) if space in _NAMESPACES else None
    for part in rest.split("."):
        found = getattr(found, part, None) if part.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload):
        raise PlanError.of("bad_bundle", f"a bundle names {name!r}, which is no op")
    return found
