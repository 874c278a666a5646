"""The edit that says how a program decodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.ir.rewriter import Rewriter
from graphopt.passkit.drafting import Drafting
from graphopt.passkit.edits import Edit
from graphopt.views import Views


@dataclass(frozen=True, eq=False)
class Speculation(Edit):
    """How the program decodes from now on: kept in the trail, while the graph stays."""

    drafting: Drafting

    @property
    def candidate(self) -> str:
        """Decoding is one candidate."""
        return "model:decoding"

    def describe(self) -> str:
        """Who drafts."""
        return f"decode with drafts by {self.drafting.drafter.kind}, rows {list(self.drafting.rows)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {"edit": "speculation", **self.drafting.to_json()}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing: the graph that verifies drafts is the one that there is."""

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """Nothing, as in `apply`."""
