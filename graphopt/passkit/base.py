"""The base class of passes. A pass is its frozen, printable, re-parsable configuration.

This module and every pass's top level import no torch, so that a spec with a mistake is refused before a model (or
torch) loads; what needs tensors is imported inside the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from graphopt.passkit.facts import Effect, Fact

if TYPE_CHECKING:
    from graphopt.ir.program import Program
    from graphopt.observe import Statistics, Tap
    from graphopt.passkit.edits import Plan
    from graphopt.views import Views


@dataclass(frozen=True)
class Context:
    """What a plan may look at: the views, the statistics it asked for, and the layers that `where` selects."""

    views: Views
    layers: tuple[int, ...]
    statistics: Statistics | None = None
    seed: int = 0
    paths: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """The program that the plan is for."""
        return self.views.program

    def covers(self, layer: int, path: str) -> bool:
        """Whether the step's `where` covers a view of a layer."""
        return layer in self.layers and (not self.paths or path in self.paths)


class Pass(BaseModel):
    """One rewrite: options as fields, `plan` decides, edits carry out.

    Subclasses set `name` (as in YAML `use:`), `effect`, and the facts they need, forbid, add and drop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: ClassVar[str] = ""
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.CAPTURED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    adds: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset()
    idempotent: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def needs_calibration(self) -> bool:
        """Whether `observe` will ask for statistics; known from the options alone."""
        return False

    def refers_to(self) -> tuple[str, ...]:
        """Ids of earlier steps that the options name."""
        return ()

    def reads(self) -> Literal["none", "rows", "whole"]:
        """What planning holds of weights: none, some rows at a time, or whole ones; known from the options alone."""
        return "whole"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """The statistics that `plan` needs from calibration; none by default."""
        return ()

    def plan(self, context: Context) -> Plan:
        """Decide: every candidate gets an edit or a reasoned decline. Changes nothing."""
        raise NotImplementedError

    def to_yaml(self) -> dict[str, Any]:
        """The step that makes this pass again."""
        return {"use": self.name, **self.model_dump(mode="json", exclude_defaults=True)}
