"""What commands print: results on stdout, everything else on stderr, errors as diagnostics with exit codes."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from graphopt.diagnostics import Diagnostic, GraphoptError, render

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.report.page import Page

P = ParamSpec("P")
JSON = Annotated[bool, typer.Option("--json", help="Print JSON, errors included.")]
INTERRUPTED = 130
# Third parties warn about optional parts and internals that a user of graphopt cannot act on; our own warnings pass.
_NOISY = r"(torch|transformers|huggingface_hub|sympy|networkx)(\.|$)"


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Run a command with third parties quiet, errors printed (exit code 1) and Ctrl-C answered in one line (130)."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        as_json = bool(kwargs.get("as_json"))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=_NOISY)
                function(*args, **kwargs)
        except GraphoptError as error:
            show_error(error, as_json=as_json)
            raise typer.Exit(1) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            show_error(GraphoptError.of("os_error", f"{where}{error.strerror or error}"), as_json=as_json)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("graphopt: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def show_error(error: GraphoptError, *, as_json: bool) -> None:
    """Print an error: rendered on stderr, or as JSON on stdout."""
    if as_json:
        show_json(error.to_json())
        return
    color = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    diagnostics: tuple[Diagnostic, ...] = error.diagnostics
    typer.echo("\n\n".join(render(each, color=color) for each in diagnostics), err=True)


def show_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def show_page(page: Page) -> None:
    """Print a page: with colours on a terminal, as plain text into a pipe."""
    if sys.stdout.isatty():
        show_rich(page.rich())
    else:
        typer.echo(page.plain(), nl=False)


def show_rich(renderable: RenderableType) -> None:
    """Print something of rich's on stdout."""
    from rich.console import Console

    Console().print(renderable, soft_wrap=True)
