"""Generation by running the stateless graph on the growing sequence.

Every step computes the whole sequence again, so that any program generates, whatever was done to it. A pass that
inserts a KV cache gives the fast path later; this one stays the reference that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.run import Runner

Stream = Callable[[torch.Tensor], None]


def generate(
    model: Program | Runner,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    padding: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Iterable[int] | None = None,
    stream: Stream | None = None,
) -> torch.Tensor:
    """Continue prompts `[B, S]` to `[B, S + new]`, new at most `max_new_tokens`; there is no KV cache yet.

    `padding` `[B, S]` is 1 at real tokens; shorter prompts are padded on the left. Temperature 0 takes the likeliest
    token; otherwise tokens are drawn from the `top_k` likeliest and the smallest set of mass `top_p`, the same ones for
    the same seed. A row that has produced an `eos` token repeats it until all rows have. `stream` sees each step's
    tokens `[B]`. Raises PlanError for a program without tokens, logits or (when needed) padding, and ValueError for
    numbers out of range.
    """
    _check(input_ids, padding, max_new_tokens, temperature, top_k, top_p)
    run = model if isinstance(model, Runner) else Runner(model, torch.float32, "cpu")
    tokens_name, padding_name, positions_name = _inputs(run.program, padding)
    generator = torch.Generator().manual_seed(seed)
    stops = torch.tensor([eos] if isinstance(eos, int) else sorted(eos or ()), dtype=torch.long)
    sequence = input_ids.to("cpu", torch.long)
    mask = torch.ones_like(sequence) if padding is None else padding.to("cpu", torch.long)
    finished = torch.zeros(sequence.shape[0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        inputs = {tokens_name: sequence}
        if padding_name is not None:
            inputs[padding_name] = mask
        if positions_name is not None:
            # Padding takes no position: the first real token of every row stands at 0.
            inputs[positions_name] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = run(**inputs)[0][:, -1].to("cpu", torch.float32)
        token = choose(logits, generator, temperature, top_k, top_p)
        token = torch.where(finished, sequence[:, -1], token)
        sequence = torch.cat([sequence, token[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], dim=1)
        finished |= torch.isin(token, stops)
        if stream is not None:
            stream(token)
        if bool(finished.all()):
            break
    return sequence


def choose(
    logits: torch.Tensor,
    generator: torch.Generator,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """One token `[B]` from logits `[B, V]`: the likeliest at temperature 0, else drawn from what the limits leave."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    scaled, order = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(scaled, dim=-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        # A token stays when those before it do not reach the mass yet, so that at least one stays.
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def _inputs(program: Program, padding: torch.Tensor | None) -> tuple[str, str | None, str | None]:
    """Names of the inputs that take tokens, padding and positions."""
    names = {spec.role: spec.name for spec in program.entry.inputs}
    if "tokens" not in names or "values" in names:
        raise PlanError.of(
            "not_generative",
            f"a program that takes {', '.join(spec.name for spec in program.entry.inputs)} cannot continue text",
        )
    result = program.output_nodes[0].meta["val"]
    if result.dim() != 3:
        raise PlanError.of("not_generative", f"the program returns {list(result.shape)}, not logits [B, S, V]")
    if padding is not None and "padding" not in names and not bool(padding.all()):
        raise PlanError.of("no_padding", "the program takes no padding, so all prompts must have one length")
    return names["tokens"], names.get("padding"), names.get("positions")


def _check(
    ids: torch.Tensor,
    padding: torch.Tensor | None,
    count: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"prompts are [B, S] with at least one token, not {list(ids.shape)}")
    if padding is not None:
        if padding.shape != ids.shape:
            raise ValueError(f"padding {list(padding.shape)} does not fit prompts {list(ids.shape)}")
        if not bool(padding[:, -1].all()) or bool((padding[:, 1:] < padding[:, :-1]).any()):
            raise ValueError("prompts are padded on the left: zeros, then ones up to the end")
    if count < 0 or temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("max_new_tokens and temperature are at least 0, top_k at least 1, top_p above 0 and at most 1")
