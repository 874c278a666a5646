"""Exceptions that carry diagnostics; every error a user can cause is one of these."""

from __future__ import annotations

from typing import Any, Self

from graphopt.diagnostics.model import Diagnostic, Place
from graphopt.diagnostics.render import render


class GraphoptError(Exception):
    """One or more diagnostics, raised together."""

    def __init__(self, first: Diagnostic, *others: Diagnostic) -> None:
        super().__init__(first, *others)
        self.diagnostics: tuple[Diagnostic, ...] = (first, *others)

    @classmethod
    def of(
        cls,
        code: str,
        message: str,
        place: Place | None = None,
        *,
        notes: tuple[str, ...] = (),
        help: tuple[str, ...] = (),
    ) -> Self:
        """Return an error of one diagnostic."""
        return cls(Diagnostic(code, message, place, notes, help))

    @property
    def code(self) -> str:
        """The code of the first diagnostic."""
        return self.diagnostics[0].code

    @property
    def place(self) -> Place | None:
        """The place of the first diagnostic."""
        return self.diagnostics[0].place

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the first diagnostic."""
        return self.diagnostics[0].notes

    def __str__(self) -> str:
        return "\n\n".join(render(diagnostic) for diagnostic in self.diagnostics)

    def to_json(self) -> dict[str, Any]:
        """Return the error as plain data."""
        return {"error": type(self).__name__, "diagnostics": [each.to_json() for each in self.diagnostics]}


class SpecError(GraphoptError):
    """The spec cannot be read or says something that is not allowed."""


class PlanError(GraphoptError):
    """A pass cannot be planned on this model, or the order of passes is illegal."""


class BudgetError(PlanError):
    """A budget cannot be met within its tolerance."""


class VerifyError(GraphoptError):
    """A pass did not keep what it promised."""


class CaptureError(GraphoptError):
    """A model cannot be captured into a graph."""


class ArtifactError(GraphoptError):
    """A checkpoint cannot be read or written."""


class CheckError(GraphoptError):
    """A check that the spec asks for was missed."""
