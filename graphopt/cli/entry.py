"""The command table and the entry point."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from graphopt import __version__
from graphopt.cli import doctor, models, specs
from graphopt.cli.output import INTERRUPTED
from graphopt.cli.shrink import shrink

app = typer.Typer(
    name="graphopt",
    help="A declarative compiler for model graphs: a spec in, a smaller or faster model out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


app.command("run")(specs.run)
app.command("plan")(specs.plan)
app.command("explain")(models.explain)
app.command("diff")(models.diff)
app.command("cost")(models.cost)
app.command("eval")(models.evaluate)
app.command("generate")(models.generate)
app.command("passes")(specs.passes)
app.command("schema")(specs.schema)
app.command("doctor")(doctor.doctor)
app.command("shrink")(shrink)


def main() -> None:
    """Run the command line; exits with 0, 1 (an error), 2 (wrong usage) or 130 (interrupted)."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("graphopt: interrupted", err=True)
        sys.exit(INTERRUPTED)
