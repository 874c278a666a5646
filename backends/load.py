"""From generated source to a callable: written to the user's own cache, imported, run on a device or interpreted."""

from __future__ import annotations

import importlib.util
import inspect
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from graphopt.backends.kernel import Kernel
from graphopt.diagnostics import PlanError


@cache
def cache_directory() -> Path:
    """Where generated sources and tuning results are kept; raises PlanError when others may write there.

    `GRAPHOPT_CACHE` names another place; sources are code, so the directory belongs to the user alone (mode 0700).
    """
    base = os.environ.get("GRAPHOPT_CACHE")
    path = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graphopt"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError.of(
            "unsafe_cache",
            f"{path} can be written by others, and graphopt runs code from there",
            help=("run chmod 700 on it, or set GRAPHOPT_CACHE to a directory of your own",),
        )
    return path


def write_source(source: str, digest: str) -> Path:
    """The file that holds a source; written once, whole or not at all."""
    path = cache_directory() / f"kernel_{digest}.py"
    if not path.is_file() or path.read_text() != source:
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(source)
        scratch.replace(path)
    return path


_modules: dict[tuple[str, bool], ModuleType] = {}


def module_of(source: str, digest: str, interpret: bool) -> ModuleType:
    """The imported module of a source; interpreted and compiled forms are two modules of one file."""
    key = (digest, interpret)
    if key not in _modules:
        path = write_source(source, digest)
        spec = importlib.util.spec_from_file_location(f"graphopt_kernel_{digest}", path)
        if spec is None or spec.loader is None:
            raise PlanError.of("unreadable_kernel", f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        if interpret:
            from graphopt.backends.interpreter import interpreting

            with interpreting():
                spec.loader.exec_module(module)
        else:
            spec.loader.exec_module(module)
        _modules[key] = module
    return _modules[key]


def callable_of(kernel: Kernel, interpret: bool) -> Callable[..., Any]:
    """What runs a kernel: takes its inputs and size scalars, returns its output or the tuple of them."""
    launch: Callable[..., Any] = module_of(kernel.source, kernel.digest, interpret).launch
    if not interpret:
        return launch
    import numpy as np
    import triton.language as tl

    from graphopt.backends.interpreter import interpreting

    # The interpreter keeps bfloat16 as raw bits, which its products would multiply: operands are widened before.
    options = {"DOT": tl.float32} if "DOT" in inspect.signature(launch).parameters else {}

    def run(*arguments: Any) -> Any:
        # Like a device, and unlike numpy, say nothing of numbers that overflow or of masked-out divisions.
        with interpreting(), np.errstate(all="ignore"):
            return launch(*arguments, **options)

    return run
