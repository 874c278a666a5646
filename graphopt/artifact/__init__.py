"""Artifacts: a Program written as a checkpoint that loads again, stock when a stock config can say it.

The names load lazily, because `import graphopt` installs the hook of this package and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.artifact.loading import load
    from graphopt.artifact.saving import SaveReport, save

__all__ = ["SaveReport", "load", "save"]

_HOMES = {
    "SaveReport": "graphopt.artifact.saving",
    "load": "graphopt.artifact.loading",
    "save": "graphopt.artifact.saving",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphopt.artifact' has no attribute {name!r}")
