"""Commands about specs: run, plan, passes, schema."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.output import JSON, command, show_json, show_page, show_rich
from graphopt.cli.progress import reporter

if TYPE_CHECKING:
    from graphopt.passkit import Pass, Plan
    from graphopt.report.page import Page
    from graphopt.spec import LoadedSpec, StepSpec

Spec = Annotated[Path, typer.Argument(help="The spec, a YAML file.", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Checkpoint directory or model id, instead of the spec's.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value of the spec; repeatable.")
]


Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="4GiB", help="What the process may use; kept, or refused at the start."),
]


class Level(StrEnum):
    """How much is verified after every step."""

    full = "full"
    shapes = "shapes"
    off = "off"


@command
def run(
    spec: Spec,
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory that the result is saved to.")] = None,
    settings: Settings = None,
    verify: Annotated[
        Level | None, typer.Option(help="What to verify after every step; the spec's where absent.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that graphopt wrote.")] = False,
    memory: Memory = None,
    state: Annotated[
        Path | None, typer.Option(help="Directory in which steps that train keep their state, to go on from it.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Transform a model as a spec says, verify every step, and save the result."""
    loaded = _load(spec, settings)
    if out is not None:
        from graphopt.spec import safe_output

        out = safe_output(out)
    from graphopt.compiler.compile import compile
    from graphopt.observe.distributed import join, leave, rank
    from graphopt.report.run_report import plain, rich, run_report

    joined = join()
    with reporter() as progress:
        program = compile(
            model,
            loaded,
            out=out,
            verify=None if verify is None else verify.value,
            overwrite=overwrite,
            progress=progress,
            memory=_bytes(memory),
            state=state,
        )
    first = rank() == 0
    leave(joined)
    if not first:
        return
    report = run_report(program)
    if as_json:
        show_json({**report, "out": None if out is None else str(out)})
        return
    if sys.stdout.isatty():
        show_rich(rich(report))
    else:
        typer.echo(plain(report), nl=False)
    typer.echo(f"saved to {out}" if out is not None else "nothing was saved; --out DIR keeps the result", err=True)


@command
def plan(
    spec: Spec,
    model: Model = None,
    settings: Settings = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Add the memory, bytes and time that the run would need.")
    ] = False,
    memory: Memory = None,
    as_json: JSON = False,
) -> None:
    """Show what each step of a spec would change and what it declines, and why; writes nothing."""
    loaded = _load(spec, settings)
    from graphopt.compiler.compile import plan_and_estimate

    with reporter() as progress:
        planned, needs = plan_and_estimate(model, loaded, progress, _bytes(memory), estimate)
    if as_json:
        steps = [_step_json(step, decided) for step, decided in planned]
        show_json({"spec": loaded.file, "steps": steps, **({"estimate": needs.to_json()} if needs else {})})
        return
    page = _plan_page(planned)
    if needs is not None:
        page.title("estimate", "of the whole run on this machine")
        page.row("peak memory", f"{needs.peak_memory / (1 << 30):.2f} GiB")
        page.row("read", f"{needs.bytes_read:,} bytes of tensors")
        page.row("written", f"{needs.bytes_written:,} bytes of tensors")
        page.row("time", f"{needs.seconds:,} s: " + ", ".join(f"{name} {s}" for name, s in needs.stages.items()))
    show_page(page)


def _bytes(text: str | None) -> int | None:
    from graphopt.spec import ByteSize, ScalarError

    try:
        return None if text is None else int(ByteSize.parse(text))
    except ScalarError as error:
        raise typer.BadParameter(str(error), param_hint="--memory") from error


@command
def passes(
    name: Annotated[str | None, typer.Argument(help="A pass to explain.", show_default=False)] = None,
    as_json: JSON = False,
) -> None:
    """List the passes that specs may use, or explain one with its options."""
    from graphopt.passkit import PassRegistry
    from graphopt.report.page import Page

    registry = PassRegistry()
    if name is not None:
        kind = registry.get(name)
        if as_json:
            show_json(_pass_json(kind))
        else:
            show_page(_pass_page(kind))
        return
    listed: dict[str, str] = {}
    for each in registry.names():
        try:
            listed[each] = _document(registry.get(each)).partition("\n")[0]
        except ImportError as error:
            # One broken third-party package must not hide the others; the line says what is wrong with it.
            listed[each] = f"cannot be loaded: {error}"
    if as_json:
        show_json(listed)
        return
    page = Page()
    for each, line in listed.items():
        page.row(each, line)
    show_page(page)


@command
def schema() -> None:
    """Print the JSON Schema of specs, for editors."""
    from graphopt.passkit import PassRegistry
    from graphopt.spec import json_schema

    show_json(json_schema(PassRegistry()))


def _load(spec: Path, settings: list[str] | None) -> LoadedSpec:
    """The valid spec, its facts and order checked, before anything heavy loads."""
    from graphopt.compiler.resolve import resolve
    from graphopt.passkit import PassRegistry
    from graphopt.spec import load_spec

    loaded = load_spec(spec, settings or (), registry=PassRegistry())
    resolve(loaded)
    return loaded


def _step_json(step: StepSpec, decided: Plan) -> dict[str, Any]:
    return {
        "step": step.id,
        "use": step.use,
        "place": step.place.to_json(),
        "edits": [edit.to_json() for edit in decided.edits],
        "declines": [decline.to_json() for decline in decided.declines],
        "notes": dict(decided.notes),
    }


def _plan_page(planned: Iterable[tuple[StepSpec, Plan]]) -> Page:
    from graphopt.report.page import Page

    page = Page()
    for number, (step, decided) in enumerate(planned, 1):
        counts = f"{len(decided.edits)} edits, {len(decided.declines)} declined"
        page.title(f"{number} {step.id}", f"({step.place})  {counts}")
        for line in _gathered(edit.describe() for edit in decided.edits):
            page.row("edit", line, style="green")
        for line in _gathered(f"{decline.candidate}: {decline.reason}" for decline in decided.declines):
            page.row("decline", line, style="yellow")
        for key, value in decided.notes.items():
            page.row("note", f"{key}: {value}")
    return page


def _gathered(lines: Iterable[str]) -> list[str]:
    """Lines of the form `path: text` with equal texts gathered over their paths."""
    from graphopt.report.page import fold

    groups: dict[str, list[str]] = {}
    for line in lines:
        path, _, text = line.partition(": ")
        groups.setdefault(text, []).append(path)
    return [f"{', '.join(fold(paths))}: {text}" if text else ", ".join(paths) for text, paths in groups.items()]


def _document(kind: type[Pass]) -> str:
    """A pass's own docstring, or its module's where the class has none."""
    own = kind.__dict__.get("__doc__") or inspect.getmodule(kind).__doc__  # type: ignore[union-attr]
    return inspect.cleandoc(own or "no description")


def _pass_json(kind: type[Pass]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "description": _document(kind),
        "effect": str(kind.effect),
        **{each: sorted(map(str, getattr(kind, each))) for each in ("needs", "forbids", "adds", "drops")},
        "options": _options(kind),
        "schema": kind.model_json_schema(),
    }


def _options(kind: type[Pass]) -> list[dict[str, Any]]:
    return [
        {
            "name": field.alias or name,
            "type": _type(field.annotation),
            "required": field.is_required(),
            "default": None if field.is_required() else str(field.get_default(call_default_factory=True)),  # type: ignore[call-arg]
            "description": field.description,
        }
        for name, field in kind.model_fields.items()
    ]


def _type(annotation: Any) -> str:
    """An annotation without module paths."""
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("NoneType", "None")
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def _pass_page(kind: type[Pass]) -> Page:
    from graphopt.report.page import Page

    page = Page()
    page.title(kind.name, f"{kind.effect}")
    for line in _document(kind).splitlines():
        page.lines.append(("", f"  {line}", ""))
    for fact in ("needs", "forbids", "adds", "drops"):
        found = sorted(map(str, getattr(kind, fact)))
        if found:
            page.row(fact, ", ".join(found))
    page.title("options")
    for option in _options(kind):
        default = "required" if option["required"] else f"default {option['default']}"
        about = f"  {option['description']}" if option["description"] else ""
        page.row(option["name"], f"{option['type']}, {default}{about}")
    return page
