"""Choosing block sizes by time: a search from the template's own sizes, and a cache of what was chosen.

A choice belongs to a kernel's source, a device, a version of Triton and the sizes of the arguments (rounded up to powers
of two, so that a growing text is not timed again for each length). It is a small JSON file beside the sources.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from graphopt.backends.ahead import compile_ahead
from graphopt.backends.kernel import Kernel
from graphopt.backends.load import cache_directory, module_of

Choice: TypeAlias = dict[str, int]
Timer: TypeAlias = Callable[[Callable[[], Any]], float]

# Bytes of shared memory that one program may take.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Sizes that hold a whole row are no choice; tensor cores take no fewer than 16.
FIXED = frozenset({"DBLOCK", "EBLOCK", "SBLOCK"})
LEAST = {"MBLOCK": 16, "TBLOCK": 16}
MOST = {"SPLITS": 64, "num_warps": 16, "MBLOCK": 256, "TBLOCK": 256, "NBLOCK": 256, "XBLOCK": 4096, "RBLOCK": 4096}
MATRIX = frozenset({"gemm", "expert_gemm"})
ROUNDS = 3
GAIN = 0.98  # a neighbour must be this much faster to be taken: less is noise


def defaults(kernel: Kernel) -> Choice:
    """The sizes that a kernel's launch takes when nothing is chosen."""
    found = inspect.signature(module_of(kernel.source, kernel.digest, interpret=False).launch).parameters.values()
    return {each.name: each.default for each in found if type(each.default) is int and each.name not in FIXED}


def neighbours(template: str, choice: Choice) -> Iterator[Choice]:
    """Choices that differ from one in one size, by a factor of two."""
    for name, value in choice.items():
        least = LEAST.get(name, 16 if template in MATRIX and name != "num_warps" else 1)
        for other in (value // 2, value * 2):
            if least <= other <= MOST.get(name, 4096):
                yield {**choice, name: other}


def fits(kernel: Kernel, choice: Choice, target: str) -> bool:
    """Whether a kernel compiles for a target with these sizes within its shared memory, and without spilling."""
    used = compile_ahead(kernel, target, choice)
    return all(each.shared <= SHARED[target] and not each.spilled for each in used)


def device_timer(run: Callable[[], Any]) -> float:
    """The median time of a call on the device, in seconds, the caches emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=30, return_mode="median")) / 1e3


def device_name() -> str:
    """The device that choices are for; "none" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


@dataclass
class Tuner:
    """Chooses by `timer` for the device called `device`; with `target`, what does not fit is left out before it runs."""

    device: str
    timer: Timer = device_timer
    target: str | None = None
    directory: Path = field(default_factory=cache_directory)

    def choose(self, kernel: Kernel, arguments: Sequence[Any]) -> Choice:
        """The choice for a kernel and the sizes of its arguments: the stored one, or the fastest that is found."""
        file = self.file(kernel, arguments)
        start = defaults(kernel)
        stored = self._stored(file, kernel, start)
        if stored is not None:
            return stored
        if any(isinstance(a, torch.Tensor) and a.device.type == "meta" for a in arguments):
            return start  # nothing runs, so nothing is timed
        times: dict[str, float] = {}
        best = self._search(kernel, start, arguments, times)
        said = {**self.key(kernel, arguments), "chosen": best, "times": times}
        scratch = file.with_suffix(".part")
        scratch.write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
        scratch.replace(file)
        return best

    def key(self, kernel: Kernel, arguments: Sequence[Any]) -> dict[str, Any]:
        """What a choice belongs to."""
        import triton

        return {
            "kernel": kernel.digest,
            "device": self.device,
            "triton": triton.__version__,
            "sizes": sizes_of(arguments),
        }

    def file(self, kernel: Kernel, arguments: Sequence[Any]) -> Path:
        """Where a choice is stored."""
        text = json.dumps(self.key(kernel, arguments), sort_keys=True)
        return self.directory / f"tuned_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def _stored(self, file: Path, kernel: Kernel, known: Mapping[str, int]) -> Choice | None:
        """A stored choice; None when there is none, or when what is there is no choice of this kernel."""
        try:
            said = json.loads(file.read_text())
            chosen = said["chosen"]
            right = said["kernel"] == kernel.digest and set(chosen) == set(known)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        sizes = [value for value in chosen.values() if type(value) is int and 0 < value <= 4096]
        return chosen if right and len(sizes) == len(chosen) else None

    def _search(self, kernel: Kernel, start: Choice, arguments: Sequence[Any], times: dict[str, float]) -> Choice:
        """Go to the fastest neighbour until none is faster; raises what the kernel's own sizes raise."""
        launch = module_of(kernel.source, kernel.digest, interpret=False).launch

        def time(choice: Choice) -> float:
            return self.timer(lambda: launch(*arguments, **choice))

        best, shortest = start, time(start)
        times[_name(start)] = shortest
        for _ in range(ROUNDS):
            before = best
            for choice in neighbours(kernel.template, before):
                if _name(choice) in times:
                    continue
                times[_name(choice)] = found = self._time(kernel, choice, time)
                if found < GAIN * shortest:
                    best, shortest = choice, found
            if best is before:
                break
        return best

    def _time(self, kernel: Kernel, choice: Choice, time: Callable[[Choice], float]) -> float:
        """How long a choice takes; infinitely long when the device cannot run it."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        if self.target is not None and not fits(kernel, choice, self.target):
            return float("inf")
        try:
            return time(choice)
        except (OutOfResources, PTXASError, CompilationError):
            return float("inf")


def tuned(kernel: Kernel, tuner: Tuner) -> Callable[..., Any]:
    """What runs a kernel with the sizes that are best for its arguments, chosen when such arguments first come."""
    launch = module_of(kernel.source, kernel.digest, interpret=False).launch
    known: dict[str, Choice] = {}

    def run(*arguments: Any) -> Any:
        sizes = sizes_of(arguments)
        if sizes not in known:
            known[sizes] = tuner.choose(kernel, arguments)
        return launch(*arguments, **known[sizes])

    return run


def sizes_of(arguments: Sequence[Any]) -> str:
    """Sizes of arguments as text, each rounded up to a power of two."""
    shapes = [a.shape if isinstance(a, torch.Tensor) else (a,) for a in arguments]
    return " ".join("x".join(str(1 << max(int(size) - 1, 0).bit_length()) for size in shape) for shape in shapes)


def _name(choice: Choice) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(choice.items()))
