"""graphopt: a declarative compiler for model graphs.

The public names load lazily, so that `import graphopt` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.artifact import load, save
    from graphopt.compiler.compile import capture, compile
    from graphopt.ir.program import Program
    from graphopt.passkit import Pass
    from graphopt.spec import load_spec

from graphopt.artifact.hook import install as _install_auto_classes

__version__ = "0.1.0"
__all__ = ["Pass", "Program", "capture", "compile", "load", "load_spec", "save"]

_HOMES = {
    "Pass": "graphopt.passkit",
    "Program": "graphopt.ir.program",
    "capture": "graphopt.compiler.compile",
    "compile": "graphopt.compiler.compile",
    "load": "graphopt.artifact",
    "load_spec": "graphopt.spec",
    "save": "graphopt.artifact",
}

# Checkpoints in our own format load through transformers' auto classes from here on; imports neither of the two now.
_install_auto_classes()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
