"""What a pass is made of. Light names load at once; those that need torch load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.passkit.registry import PassRegistry

if TYPE_CHECKING:
    from graphopt.passkit.edits import Anchor, Cut, Decline, Edit, Plan, Skip, Train

__all__ = [
    "Anchor",
    "Context",
    "Cut",
    "Decline",
    "Edit",
    "Effect",
    "Fact",
    "Pass",
    "PassRegistry",
    "Plan",
    "Skip",
    "Train",
]


def __getattr__(name: str) -> Any:
    if name in ("Anchor", "Cut", "Decline", "Edit", "Plan", "Skip", "Train"):
        return getattr(import_module("graphopt.passkit.edits"), name)
    raise AttributeError(name)
