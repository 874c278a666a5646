"""Commands about models: explain, diff, cost, eval, generate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.output import JSON, command, show_json, show_page
from graphopt.cli.progress import reporter

if TYPE_CHECKING:
    from graphopt.ir.program import Program

Model = Annotated[str, typer.Argument(help="Checkpoint directory or model id.", show_default=False)]


@command
def explain(
    model: Model,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph itself, one line a node.")] = False,
    lowered: Annotated[bool, typer.Option("--lowered", help="Show the kernels that it becomes on a GPU.")] = False,
    at: Annotated[str, typer.Option(help="With --lowered: sizes of the dimensions.", metavar="B=1,S=1")] = "B=1,S=1",
    target: Annotated[
        str, typer.Option(help="With --lowered: the device of the roofline.", metavar="a100|h100|h200|b200|mi300x")
    ] = "h200",
    source: Annotated[
        str | None,
        typer.Option(help="With --lowered: add the sources of kernels whose names begin so.", metavar="NAME|all"),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Show a model as blocks with heads, widths, norms, positions and costs."""
    program = _capture(model)
    if lowered:
        _explain_lowered(program, _sizes(at), target, source, as_json=as_json)
        return
    from graphopt.ir.text import print_program
    from graphopt.report.explain import explain as page_of
    from graphopt.report.explain import explain_json

    if as_json:
        show_json({**explain_json(program), **({"graph": print_program(program)} if graph else {})})
    elif graph:
        typer.echo(print_program(program), nl=False)
    else:
        show_page(page_of(program))


def _explain_lowered(
    program: Program, sizes: dict[str, int], target: str, source: str | None, *, as_json: bool
) -> None:
    """Print the kernels of a program in bfloat16 at given sizes."""
    from graphopt.ir.leaving import rooms

    names = {dim.name for dim in program.dims} - set(rooms(program))
    if names != set(sizes):
        raise typer.BadParameter(f"the model's dimensions are {', '.join(sorted(names))}", param_hint="--at")
    import torch

    from graphopt.backends import lower
    from graphopt.report.lowered import lowered_json, lowered_page, roof_of

    roof = roof_of(target)
    found = lower(program, "cuda", dtype=torch.bfloat16, sizes=sizes)
    if as_json:
        show_json({"model": program.origin.name, **lowered_json(found, sizes, roof, source)})
    else:
        show_page(lowered_page(found, sizes, roof, source))


@command
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="The model before.", show_default=False)],
    after: Annotated[str, typer.Argument(metavar="B", help="The model after.", show_default=False)],
    graph: Annotated[bool, typer.Option("--graph", help="Add the difference node by node.")] = False,
    as_json: JSON = False,
) -> None:
    """Compare two models: views first, then weights, cost and ops."""
    a, b = _capture(before), _capture(after)
    from graphopt.report.diff import diff as differences
    from graphopt.report.diff import diff_page

    if as_json:
        show_json(differences(a, b, graph=graph, names=(before, after)))
    else:
        show_page(diff_page(a, b, graph=graph, names=(before, after)))


@command
def cost(
    model: Model,
    at: Annotated[str, typer.Option(help="Sizes of the dimensions.", metavar="B=1,S=2048")] = "B=1,S=2048",
    as_json: JSON = False,
) -> None:
    """Count parameters, bytes, FLOPs and KV bytes, as formulae and at given sizes."""
    sizes = _sizes(at)
    program = _capture(model)
    from graphopt.ir.leaving import rooms

    names = {dim.name for dim in program.dims} - set(rooms(program))
    if names != set(sizes):
        raise typer.BadParameter(f"the model's dimensions are {', '.join(sorted(names))}", param_hint="--at")
    from graphopt.cost import cost as count
    from graphopt.report.costs import cost_page

    found = count(program)
    if as_json:
        show_json({"model": program.origin.name, "at": sizes, "numbers": found.at(**sizes), **found.to_json()})
    else:
        show_page(cost_page(program.origin.name, found, sizes))


@command
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="A text, .jsonl with `text` fields, or token ids as .npy.")],
    samples: Annotated[int, typer.Option(min=1, help="Sequences to take.")] = 64,
    seq: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 256,
    as_json: JSON = False,
) -> None:
    """Measure the perplexity of a model on a text."""
    if not data.is_file():
        raise typer.BadParameter(f"there is no file {str(data)!r}", param_hint="--data")
    program = _capture(model)
    from graphopt.compiler.text import evaluate as measure
    from graphopt.report.page import Page

    with reporter() as progress:
        progress.stage("evaluate", None)
        found = measure(program, data, samples, seq)
    if as_json:
        show_json({"model": program.origin.name, "data": str(data), "samples": samples, "seq": seq, **found})
        return
    page = Page()
    page.title(program.origin.name, f"on {data}, {samples:,} sequences of {seq:,} tokens")
    page.row("perplexity", f"{found['perplexity']:,.4f}")
    page.row("nats/token", f"{found['nats_per_token']:.5f}")
    page.row("predicted", f"{found['tokens']:,} tokens")
    show_page(page)


@command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to add at most.")] = 64,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture that the prompt has a place for; may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-9, max=1.0, help="Draw from the smallest set of this mass.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(min=1e-9, help="Above 1, tokens that the text holds become less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End where the new text holds this; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Keep keys and values of the text so far.")] = True,
    draft: Annotated[
        bool, typer.Option("--draft/--no-draft", help="Draft as the model's spec says, if it does.")
    ] = True,
    as_json: JSON = False,
) -> None:
    """Continue a text, printing it as it grows."""
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise typer.BadParameter("nothing is drawn at temperature 0", param_hint="--top-k" if top_k else "--top-p")
    program = _capture(model)
    import torch

    from graphopt.diagnostics import PlanError
    from graphopt.runtime import generate as continue_prompt
    from graphopt.runtime import with_cache
    from graphopt.runtime.speculate.setup import drafting_of, speculator

    file = Path(program.origin.path or "") / "tokenizer.json"
    if not program.origin.path or not file.is_file():
        raise PlanError.of("no_tokenizer", "the model has no tokenizer.json beside its weights")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    context: dict[str, torch.Tensor] = {}
    ids = tokenizer.encode(prompt).ids
    if image:
        from graphopt.frontend.processor import read_pictures

        ids, context = read_pictures(program, prompt, image)
    if not ids:
        raise typer.BadParameter("the prompt holds no token", param_hint="--prompt")
    drafting = drafting_of(program) if draft and cache else None
    if drafting is not None and (stop or repetition_penalty != 1.0):
        typer.echo("no drafts: stop strings and repetition penalties look at every token", err=True)
    elif drafting is not None:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        drafted = speculator(program, drafting, **options)  # type: ignore[arg-type]
        ends, written = _end_tokens(program), _Writer(tokenizer, ids, silent=as_json)
        found, log = drafted.generate(torch.tensor(ids), max_new_tokens, ends, stream=written.add, **context)
        _show_text(written, prompt, found.tolist(), as_json, cached=True, drafts=log.to_json())
        return
    reason = None
    if cache:
        program, reason = with_cache(program)
        if reason is not None:
            typer.echo(f"no cache, so every token runs the whole text: {reason}", err=True)
    elif program.cached:
        raise typer.BadParameter("the model has a cache, and runs with it", param_hint="--no-cache")
    written = _Writer(tokenizer, ids, silent=as_json)
    result = continue_prompt(
        program,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        eos=_end_tokens(program),
        stop=tuple(stop or ()),
        decode=tokenizer.decode,
        stream=lambda token: written.add(int(token[0])),
        **context,
    )
    _show_text(written, prompt, result[0].tolist(), as_json, cached=cache and reason is None)


def _show_text(
    written: _Writer, prompt: str, tokens: list[int], as_json: bool, *, cached: bool, **more: dict[str, Any]
) -> None:
    if not as_json:
        written.end()
        return
    text = written.tokenizer.decode(tokens)
    new = len(tokens) - written.prompt
    show_json({"prompt": prompt, "text": text, "tokens": tokens, "new_tokens": new, "cached": cached, **more})


class _Writer:
    """Prints text as its tokens arrive; half a character waits for its other half."""

    def __init__(self, tokenizer: Any, ids: list[int], *, silent: bool) -> None:
        self.tokenizer, self.ids, self.silent = tokenizer, list(ids), silent
        self.prompt = len(ids)
        self.shown = ""
        self._print(self.tokenizer.decode(self.ids))

    def add(self, token: int) -> None:
        """Take one more token."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            self._print(text)

    def end(self) -> None:
        """Print what is left and end the line."""
        self._print(self.tokenizer.decode(self.ids))
        typer.echo()

    def _print(self, text: str) -> None:
        if not self.silent and text.startswith(self.shown):
            typer.echo(text[len(self.shown) :], nl=False)
            sys.stdout.flush()
            self.shown = text


def _end_tokens(program: Program) -> list[int]:
    """Tokens that end a text, as generation_config.json or the source's config says."""
    file = Path(program.origin.path or "") / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = settings.get("eos_token_id", (program.origin.config or {}).get("eos_token_id"))
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _capture(model: str) -> Program:
    from graphopt.compiler.compile import capture

    with reporter() as progress:
        progress.stage(f"capture {model}", None)
        return capture(model)


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if not name or not value.strip().isdecimal() or int(value) < 1 or name in sizes:
            raise typer.BadParameter(f"{part.strip()!r} is not like B=1", param_hint="--at")
        sizes[name.strip()] = int(value)
    return sizes
