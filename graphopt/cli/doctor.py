"""The command that says whether graphopt can work here."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from graphopt import __version__
from graphopt.cli.output import JSON, command, show_json, show_page

# First and last supported minor releases; triton is only needed for kernels.
SUPPORTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23)), "triton": ((3, 6), (3, 9))}
PYTHON = ((3, 11), (3, 13))
OPTIONAL = frozenset({"triton"})


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `state` is ok, absent (and not needed) or problem."""

    name: str
    found: str
    state: str
    note: str = ""


def findings() -> list[Finding]:
    """Look at versions, devices and the cache directory."""
    found = [_judge("python", platform.python_version(), PYTHON)]
    for name, supported in SUPPORTED.items():
        try:
            found.append(_judge(name, version(name), supported))
        except PackageNotFoundError:
            state = "absent" if name in OPTIONAL else "problem"
            note = "needed for generated kernels only" if name in OPTIONAL else f"pip install {name}"
            found.append(Finding(name, "not installed", state, note))
    return [*found, _device(), _cache()]


@command
def doctor(as_json: JSON = False) -> None:
    """Check versions, device and cache; exits with 1 when something that is needed is off."""
    from graphopt.report.page import Page

    found = findings()
    healthy = all(each.state != "problem" for each in found)
    if as_json:
        show_json({"graphopt": __version__, "healthy": healthy, "findings": [asdict(each) for each in found]})
    else:
        page = Page()
        page.title(f"graphopt {__version__}")
        styles = {"ok": "green", "absent": "yellow", "problem": "red"}
        for each in found:
            mark = "" if each.state == "ok" else f"  {each.state.upper()}"
            note = f"  ({each.note})" if each.note else ""
            page.row(each.name, f"{each.found}{mark}{note}", style=styles[each.state])
        show_page(page)
    if not healthy:
        raise typer.Exit(1)


def _judge(name: str, text: str, supported: tuple[tuple[int, int], tuple[int, int]]) -> Finding:
    low, high = (".".join(map(str, bound)) for bound in supported)
    match = re.match(r"(\d+)\.(\d+)", text)
    fits = match is not None and supported[0] <= (int(match[1]), int(match[2])) <= supported[1]
    return Finding(name, text, "ok" if fits else "problem", f"supported: {low} to {high}")


def _device() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("device", "unknown", "problem", f"torch does not load: {error}")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", ", ".join(names), "ok")
    return Finding("device", f"CPU, {os.cpu_count()} cores", "ok", "no GPU: kernels are delegated to the CPU")


def _cache() -> Finding:
    base = os.environ.get("GRAPHOPT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "graphopt"
    path = Path(base).expanduser()
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Finding("cache", str(path), "ok" if writable else "problem", "" if writable else f"{there} is not writable")
