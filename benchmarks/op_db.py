"""torch's op database through `torch.compile(backend=...)` on a CPU: every sample beside eager, op by op.

python benchmarks/op_db.py --backend graphopt --dtype float32 --out benchmarks/results/op_db.json

`--modules` runs torch's modules (module_db) instead, in evaluation mode.

The file holds one run for each backend, dtype and option, is written every few ops, and a run that was stopped goes on
where it was; `--again` starts anew. `--table` prints what the file holds as Markdown.

An op is `ok` when all its samples agree with eager; `wrong` when a result differs; `backend_error` when the backend fails
where `backend="eager"` captures the op; `not_capturable` when that fails too; `random`
when eager differs from itself or returns what is not initialised.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when the body takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def samples_of(op: Any, dtype: torch.dtype, count: int) -> list[Any]:
    """The first samples of an op, from a fixed seed."""
    torch.manual_seed(0)
    found = []
    for sample in op.sample_inputs("cpu", dtype, requires_grad=False):
        found.append(sample)
        if len(found) == count:
            break
    return found


def call(op: Any, sample: Any, wrap: Callable[..., Any] = lambda f: f) -> Any:
    """Run one sample on clones, seeded, through `wrap`."""

    def function(value: Any, args: Any, kwargs: Any) -> Any:
        return op.op(value, *args, **kwargs)

    own = pytree.tree_map(_copied, (sample.input, sample.args, sample.kwargs))
    torch.manual_seed(1)
    with torch.no_grad():
        return wrap(function)(*own)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, torch.nn.Module) else value


@dataclass(frozen=True)
class ModuleCase:
    """A module of torch's module database as an op whose first argument is the module."""

    info: Any
    name: str
    variant_test_name: str = ""

    def op(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return module(*args, **kwargs)

    def supported_dtypes(self, device: str) -> Any:
        """The dtypes that it has samples of."""
        return self.info.supported_dtypes(device)

    def sample_inputs(self, device: str, dtype: torch.dtype, requires_grad: bool) -> Iterator[Any]:
        """Modules with what they are called with."""
        for each in self.info.module_inputs_func(self.info, device, dtype, requires_grad, training=False):
            made = self.info.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
            given = each.forward_input
            yield SimpleNamespace(input=made.to(device, dtype).eval(), args=given.args, kwargs=given.kwargs)


def modules() -> list[ModuleCase]:
    """torch's module database."""
    from torch.testing._internal.common_modules import module_db

    return [ModuleCase(info, info.name) for info in module_db]


def agree(got: Any, expected: Any) -> bool:
    """Whether two results agree as torch's own testing module sees it."""
    try:
        torch.testing.assert_close(got, expected, equal_nan=True, check_stride=False)
    except (AssertionError, TypeError, ValueError):
        return False
    return True


def judge(op: Any, dtype: torch.dtype, backend: str, options: dict[str, Any] | None, count: int) -> tuple[str, str]:
    """The class of one op and a line that says why."""
    try:
        samples = samples_of(op, dtype, count)
    except Exception as error:
        return "no_samples", _line(error)
    if not samples:
        return "no_samples", ""
    for sample in samples:
        try:
            expected, again = call(op, sample), call(op, sample)
        except Exception as error:
            return "no_samples", _line(error)
        torch._dynamo.reset()
        try:
            got = call(op, sample, lambda f: torch.compile(f, backend=backend, options=options))
        except Exception as error:
            torch._dynamo.reset()
            try:
                call(op, sample, lambda f: torch.compile(f, backend="eager"))
            except Exception as cause:
                return "not_capturable", _line(cause)
            return "backend_error", _line(error)
        if not agree(expected, again) or "empty" in op.name:
            # What is not initialised may hold anything, the same twice included.
            return "random", ""
        if not agree(got, expected):
            return "wrong", sample.summary() if hasattr(sample, "summary") else ""
    return "ok", ""


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def main() -> None:
    """Run the whole database, or the ops named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="graphopt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--interpret", action="store_true", help="run generated kernels under Triton's interpreter")
    parser.add_argument("--seconds", type=int, default=60, help="limit for one op")
    parser.add_argument("--modules", action="store_true", help="modules instead of ops")
    parser.add_argument("--ops", nargs="*", help="only these")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="forget what the file holds of this run")
    parser.add_argument("--table", action="store_true", help="print the file as a table and run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text())))
        return
    warnings.simplefilter("ignore")
    torch._logging.set_logs(all=logging.CRITICAL)
    if arguments.modules:
        cases: Any = modules()
    else:
        from torch.testing._internal.common_methods_invocations import op_db as cases

    dtype = getattr(torch, arguments.dtype)
    options = {"interpret": True} if arguments.interpret else None
    known = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.is_file() else {}
    key = " ".join([arguments.backend, arguments.dtype, f"{arguments.samples} samples", *(options or ())])
    key += " modules" if arguments.modules else ""
    run = {} if arguments.again else known.get(key, {})
    if run.get("torch", torch.__version__) != torch.__version__:
        run = {}
    classes: dict[str, str] = run.get("classes", {})
    reasons: dict[str, str] = run.get("reasons", {})
    seconds, started = run.get("seconds", 0.0), time.perf_counter()

    def store() -> None:
        known[key] = {
            "torch": torch.__version__,
            "seconds": round(seconds + time.perf_counter() - started, 1),
            "counts": dict(sorted(Counter(classes.values()).items())),
            "reasons": reasons,
            "classes": classes,
        }
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            scratch = arguments.out.with_suffix(".part")
            scratch.write_text(json.dumps(known, indent=1) + "\n")
            scratch.replace(arguments.out)

    for position, op in enumerate(cases):
        name = op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")
        if name in classes or (arguments.ops and name not in arguments.ops) or dtype not in op.supported_dtypes("cpu"):
            continue
        try:
            with limit(arguments.seconds):
                classes[name], reason = judge(op, dtype, arguments.backend, options, arguments.samples)
        except TimeoutError as error:
            classes[name], reason = "timeout", str(error)
        if reason:
            reasons[name] = reason
        if classes[name] in ("wrong", "backend_error", "timeout"):
            print(f"{name}: {classes[name]} {reason}", flush=True)
        if position % 20 == 0:
            store()
    store()
    print(json.dumps({"run": key, "seconds": known[key]["seconds"], "counts": known[key]["counts"]}))


def table(known: dict[str, Any]) -> str:
    """The runs of a file as a Markdown table."""
    kinds = ("ok", "wrong", "backend_error", "not_capturable", "random", "no_samples", "timeout")
    lines = ["| run | " + " | ".join(kinds) + " | seconds |", "|---|" + "---:|" * (len(kinds) + 1)]
    for key, run in known.items():
        lines.append(f"| {key} | {' | '.join(str(run['counts'].get(kind, 0)) for kind in kinds)} | {run['seconds']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
