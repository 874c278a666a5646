"""Remove what a graph computes without need: dead code, constants, repeats and operations that change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect

if TYPE_CHECKING:
    from graphopt.passkit.edits import Plan

Kind = Literal["dead", "constant", "common", "identity"]


class Cleanup(Pass):
    """Simplify the graph without changing a bit of its results.

    `dead` removes operations whose results nobody reads, by graphopt's own purity rule. `constant` computes once what
    depends on no input and no parameter, where every precision gives the same bits. `common` shares equal computations.
    `identity` removes operations that return what they are given: a view to the same shape, times one, a transpose and
    its inverse, a repeated cast. x + 0 stays, because it turns -0.0 into 0.0. `where` has no say in it.

    ```yaml
    - use: cleanup
    ```
    """

    name: ClassVar[str] = "cleanup"
    effect: ClassVar[Effect] = Effect.EXACT
    idempotent: ClassVar[bool] = True

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("identity", "common", "constant", "dead")
    """what to look for"""
    largest_constant: Annotated[int, Field(ge=1, le=2**24)] = 65536
    """largest number of elements that a folded constant may have"""

    def plan(self, context: Context) -> Plan:
        """One edit for each kind that finds something, a decline for each kind that does not, or for a near miss."""
        from graphopt.passes.simplify.rewrites import find_rewrites
        from graphopt.passkit.edits import Decline, Plan

        found = find_rewrites(context.program, frozenset(self.kinds), self.largest_constant)
        kinds = dict.fromkeys(self.kinds)
        edits = tuple(found.edits[kind] for kind in kinds if kind in found.edits)
        declines = [Decline(kind, f"already clean: {_CLEAN[kind]}") for kind in kinds if kind not in found.edits]
        declines += [Decline(f"{kind}:{node}", reason) for kind, node, reason in found.near]
        return Plan(edits, tuple(declines))


_CLEAN: dict[str, str] = {
    "dead": "every operation is read",
    "constant": "every operation depends on an input or a parameter",
    "common": "no two operations compute the same",
    "identity": "every operation changes what it is given",
}
