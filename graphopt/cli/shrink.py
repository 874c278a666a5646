"""The command that makes a failing case of `make fuzz` smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.output import command, show_json


@command
def shrink(
    file: Annotated[Path, typer.Argument(help="A reproducer that fuzzing saved.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File that the smallest case is written to.")] = None,
) -> None:
    """Reduce a failing spec and model to the smallest that still fails, and print it."""
    import json

    from graphopt.testing.cases import Case
    from graphopt.testing.cases import shrink as smallest

    case, failure = smallest(*Case.load(file))
    data = case.to_json(failure)
    show_json(data)
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{failure.law}: {failure.message}", err=True)
