"""Property-based testing of passes: models drawn by Hypothesis, laws that every pass is held to, planted bugs.

Nothing here loads before it is used, because pytest imports the plugin of every installed package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.testing.check import Report, check_pass, laws_of
    from graphopt.testing.laws import LAWS
    from graphopt.testing.lowering import LoweringBroken, check_lowering
    from graphopt.testing.models import Shape, build
    from graphopt.testing.trial import LawBroken, Refused

_HOMES = {
    "LAWS": "laws",
    "LawBroken": "trial",
    "LoweringBroken": "lowering",
    "Refused": "trial",
    "Report": "check",
    "Shape": "models",
    "build": "models",
    "check_lowering": "lowering",
    "check_pass": "check",
    "laws_of": "check",
}

__all__ = [
    "LAWS",
    "LawBroken",
    "LoweringBroken",
    "Refused",
    "Report",
    "Shape",
    "build",
    "check_lowering",
    "check_pass",
    "laws_of",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"graphopt.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'graphopt.testing' has no attribute {name!r}")
