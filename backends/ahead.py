"""Compiling kernels ahead of time, without a device: registers, spills and shared memory for every target."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphopt.backends.kernel import Entry, Kernel
from graphopt.backends.load import module_of
from graphopt.diagnostics import PlanError

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FP_FUSION = True  # a * b + c may round once, as eager CUDA kernels do


@dataclass(frozen=True)
class Resources:
    """What one function of a kernel takes on a target: a thread's registers, bytes spilled, bytes of shared memory."""

    target: str
    function: str
    registers: int
    spilled: int
    shared: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def compile_ahead(kernel: Kernel, target: str, choice: Mapping[str, int] | None = None) -> list[Resources]:
    """Compile every function of a kernel for `target`; raises PlanError for a target that is not known.

    `choice` gives block sizes other than the template's own, and `num_warps` of the main function.
    """
    module = module_of(kernel.source, kernel.digest, interpret=False)
    return [_compile(getattr(module, entry.function), _chosen(entry, choice or {}), target) for entry in kernel.entries]


def _chosen(entry: Entry, choice: Mapping[str, int]) -> Entry:
    constants = tuple((name, choice.get(name, value)) for name, value in entry.constants)
    warps = choice.get("num_warps", entry.warps) if entry.function == "kernel" else entry.warps
    return replace(entry, constants=constants, warps=warps)


def gpu_target(target: str) -> Any:
    """Triton's own description of a target; raises PlanError for one that is not known."""
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx9"):
        return GPUTarget("hip", target, 64)
    raise PlanError.of("unknown_target", f"no target is called {target!r}", help=(f"say one of {', '.join(TARGETS)}",))


def _compile(function: Any, entry: Entry, target: str) -> Resources:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1" if FP_FUSION else "0")
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    constants = {name: tl.dtype(value) if isinstance(value, str) else value for name, value in entry.constants}
    signature = {**dict(entry.signature), **dict.fromkeys(constants, "constexpr")}
    # Pointers of torch's allocator are aligned to 16 bytes; Triton's launcher says the same of them.
    names = function.arg_names
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in entry.signature if kind.startswith("*")}
    source = ASTSource(function, signature, constants, aligned)
    made = triton.compile(source, target=gpu_target(target), options={"num_warps": entry.warps})
    registers, spilled = _nvidia(made.asm["cubin"]) if "cubin" in made.asm else _amd(made.asm["amdgcn"])
    return Resources(target, entry.function, registers, spilled, int(made.metadata.shared))


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a cubin, from the tool that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", done.stdout)
    if found is None:
        raise PlanError.of(
            "unreadable_cubin", "cuobjdump reports no resource usage", notes=tuple(done.stdout.splitlines())
        )
    return int(found[1]), int(found[2]) + int(found[3])


def _amd(text: str) -> tuple[int, int]:
    """Vector registers and bytes of private memory from the notes of an AMD assembly."""
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    private = re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)
    if registers is None or private is None:
        raise PlanError.of("unreadable_assembly", "the assembly has no register counts")
    return int(registers[1]), int(private[1])
