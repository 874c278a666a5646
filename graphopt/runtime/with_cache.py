"""Giving a program its cache when it comes without one."""

from __future__ import annotations

from graphopt.ir.program import Program


def with_cache(program: Program) -> tuple[Program, str | None]:
    """The program with a cache, and why not when it cannot have one (then it is the program itself)."""
    if program.cached:
        return program, None
    # Passes and specs take half a second to import, which loading a model and torch.compile should not wait for.
    from graphopt.passkit import Context, PassRegistry
    from graphopt.passkit.edits import apply_edits
    from graphopt.views import Views

    views = Views(program)
    plan = PassRegistry().get("insert_cache")().plan(Context(views, tuple(range(len(views.blocks)))))
    if not plan.edits:
        # Those come first whose keys do not grow, which is no obstacle.
        declined = plan.declines[-1]
        return program, f"{declined.candidate}: {declined.reason}"
    return apply_edits(program, views, plan.edits, "insert_cache"), None
