"""The compiler: read `compile.py` first, it is the whole program on two pages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphopt.compiler.resolve import Resolved, resolve

if TYPE_CHECKING:
    from graphopt.compiler.compile import capture, compile, plan_steps
    from graphopt.compiler.text import evaluate, load_text

__all__ = ["Resolved", "capture", "compile", "evaluate", "load_text", "plan_steps", "resolve"]

_HOMES = {
    "capture": "graphopt.compiler.compile",
    "compile": "graphopt.compiler.compile",
    "plan_steps": "graphopt.compiler.compile",
    "evaluate": "graphopt.compiler.text",
    "load_text": "graphopt.compiler.text",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(name)
