"""Errors with places: what is wrong, where, what is allowed and what was probably meant."""

from graphopt.diagnostics.errors import (
    ArtifactError,
    BudgetError,
    CaptureError,
    CheckError,
    GraphoptError,
    PlanError,
    SpecError,
    VerifyError,
)
from graphopt.diagnostics.model import Diagnostic, Place
from graphopt.diagnostics.render import render
from graphopt.diagnostics.suggest import closest, did_you_mean

__all__ = [
    "ArtifactError",
    "BudgetError",
    "CaptureError",
    "CheckError",
    "Diagnostic",
    "GraphoptError",
    "Place",
    "PlanError",
    "SpecError",
    "VerifyError",
    "closest",
    "did_you_mean",
    "render",
]
