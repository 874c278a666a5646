"""Generation: prompts in, tokens out, by a program with a cache or, for any other, by running the whole text each time.

Both ways give the same logits, and everything else here is shared: the cached one is fast, the stateless one is the
reference that it must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.leaving import with_prompt
from graphopt.ir.program import Program
from graphopt.ir.run import Runner
from graphopt.runtime.decoder import Decoder

Stream = Callable[[torch.Tensor], None]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits.

    Temperature 0 takes the likeliest token; otherwise tokens are drawn from the `top_k` likeliest and the smallest set
    of mass `top_p`. `repetition_penalty` divides positive and multiplies negative logits of tokens that the text holds
    (CTRL, arXiv 1909.05858). Raises ValueError for numbers out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or (self.top_k is not None and self.top_k < 1):
            raise ValueError("temperature is at least 0 and top_k at least 1")
        if (self.top_p is not None and not 0 < self.top_p <= 1) or self.repetition_penalty <= 0:
            raise ValueError("top_p is above 0 and at most 1, and repetition_penalty at least above 0")


def generate(
    model: Program | Runner | Decoder,
    input_ids: torch.Tensor,
    /,
    *,
    max_new_tokens: int,
    padding: torch.Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    processors: Sequence[Processor] = (),
    seed: int = 0,
    eos: int | Iterable[int] | None = None,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    stream: Stream | None = None,
    **context: torch.Tensor,
) -> torch.Tensor:
    """Continue prompts `[B, S]` to `[B, S + new]`, new at most `max_new_tokens`; the same seed gives the same tokens.

    `padding` `[B, S]` is 1 at real tokens; shorter prompts are padded on the left. The choice is that of `Sampling`,
    after `processors` have mapped tokens so far `[B, T]` and logits `[B, V]` to other logits, in turn. A row ends with
    an `eos` token, or when its new text, by `decode`, holds a `stop` string; it repeats its last token until all rows
    have ended. `stream` sees each step's tokens `[B]`. `context` are the program's other inputs. Raises PlanError for a
    program without tokens, logits or (when needed) padding, and ValueError for numbers out of range.
    """
    _check(input_ids, padding, max_new_tokens, bool(stop) and decode is None)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    ids = input_ids.to("cpu", torch.long)
    mask = torch.ones_like(ids) if padding is None else padding.to("cpu", torch.long)
    batch, prompt = ids.shape
    text = torch.cat([ids, ids.new_zeros(batch, max_new_tokens)], dim=1)
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([eos] if isinstance(eos, int) else sorted(eos or ()), dtype=torch.long)
    finished = torch.zeros(batch, dtype=torch.bool)
    may_end = len(ends) > 0 or len(stop) > 0
    with torch.inference_mode():
        source = _source(model, ids, mask, max_new_tokens, context)
        for end in range(prompt, prompt + max_new_tokens):
            logits = source.next(text[:, :end]).to("cpu", torch.float32)
            if repetition_penalty != 1.0:
                logits = _penalised(logits, text[:, :end], source.real(end), repetition_penalty)
            for process in processors:
                logits = process(text[:, :end], logits)
            token = choose(logits, generator, sampling.temperature, sampling.top_k, sampling.top_p)
            if may_end:
                token = torch.where(finished, text[:, end - 1], token)
            text[:, end] = token
            if stream is not None:
                stream(token)
            if may_end:
                finished |= torch.isin(token, ends)
                if stop and decode is not None:
                    finished |= _stopped(text[:, prompt : end + 1], stop, decode)
                if bool(finished.all()):
                    return text[:, : end + 1].clone()
    return text.clone()


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


def _penalised(logits: torch.Tensor, text: torch.Tensor, real: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits `[B, V]` with those of tokens that stand in the text `[B, T]`, where `real`, made less likely."""
    seen = torch.zeros_like(logits).scatter_add(1, text, real.to(logits.dtype)) > 0
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _stopped(new: torch.Tensor, stop: Sequence[str], decode: Callable[[list[int]], str]) -> torch.Tensor:
    """Which rows hold a stop string in their new text."""
    texts = [decode(row) for row in new.tolist()]
    return torch.tensor([any(word in text for word in stop) for text in texts])


class _Source(Protocol):
    """Where logits come from; asked in turn for longer and longer texts."""

    def next(self, text: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` of the token that follows each row of `[B, T]`."""

    def real(self, length: int) -> torch.Tensor:
        """Which of the first tokens are no padding, `[B, length]`."""


class _Stateless:
    """The whole text, every time."""

    def __init__(
        self, run: Runner, mask: torch.Tensor, count: int, names: dict[str, str], context: dict[str, torch.Tensor]
    ) -> None:
        self.run, self.names, self.context = run, names, context
        self.prompt = mask
        self.mask = torch.cat([mask, mask.new_ones(mask.shape[0], count)], dim=1)

    def next(self, text: torch.Tensor) -> torch.Tensor:
        mask = self.real(text.shape[1])
        inputs = {self.names["tokens"]: text}
        if "padding" in self.names:
            inputs[self.names["padding"]] = mask
        if "positions" in self.names:
            # Padding takes no position: the first real token of every row stands at 0.
            inputs[self.names["positions"]] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "prompt" in self.names:
            inputs[self.names["prompt"]] = self.prompt
        return self.run(**inputs, **self.context)[0][:, -1]

    def real(self, length: int) -> torch.Tensor:
        return self.mask[:, :length]


class _Cached:
    """The prompts once, side by side from the left of the cache, then one token a row."""

    def __init__(self, decoder: Decoder, mask: torch.Tensor, count: int, context: dict[str, torch.Tensor]) -> None:
        self.decoder, self.mask = decoder, mask
        self.lengths = mask.sum(-1)
        self.cache = decoder.cache(mask.shape[0], mask.shape[1] + count, prompt=mask.shape[1], **context)
        self.started = False

    def next(self, text: torch.Tensor) -> torch.Tensor:
        device = self.decoder.device
        if self.started:
            logits = self.decoder.step(self.cache, text[:, -1:].to(device))[0][:, -1]
            self.cache.commit(1)
            return logits
        self.started = True
        order = self.mask.argsort(dim=-1, descending=True, stable=True)
        real = self.mask.gather(1, order)
        logits = self.decoder.step(self.cache, text.gather(1, order).to(device), prompt=real)[0]
        self.cache.commit(self.lengths.to(device))
        return logits[torch.arange(len(logits)), self.lengths - 1]

    def real(self, length: int) -> torch.Tensor:
        return torch.cat([self.mask, self.mask.new_ones(len(self.mask), length - self.mask.shape[1])], dim=1)


def _source(
    model: Program | Runner | Decoder,
    ids: torch.Tensor,
    mask: torch.Tensor,
    count: int,
    context: dict[str, torch.Tensor],
) -> _Source:
    """The way to logits that a program has; raises PlanError when it has none."""
    program = model if isinstance(model, Program) else model.program
    names = {spec.role: spec.name for spec in program.entry.inputs}
    own = [spec.name for spec in program.entry.inputs if spec.role == "values" and spec.name not in context]
    if "tokens" not in names or own:
        takes = ", ".join(spec.name for spec in program.entry.inputs)
        raise PlanError.of("not_generative", f"a program that takes {takes} cannot continue text by tokens alone")
    result = program.output_nodes[0].meta["val"]
    if result.dim() != 3:
        raise PlanError.of("not_generative", f"the program returns {list(result.shape)}, not logits [B, S, V]")
    if "lengths" in names:
        decoder = Decoder(program) if isinstance(model, Program) else model
        if isinstance(decoder, Decoder):
            return _Cached(decoder, mask, count, context)
        raise PlanError.of("runner_of_cache", "a program with a cache is run by a Decoder, not by a Runner")
    if "padding" not in names and not bool(mask.all()):
        raise PlanError.of("no_padding", "the program takes no padding, so all prompts must have one length")
    # What leaves is chosen from the prompt: words behind it never leave, nor change what has left.
    chosen = with_prompt(program)
    names = {spec.role: spec.name for spec in chosen.entry.inputs}
    if isinstance(model, Program):
        return _Stateless(Runner(chosen, torch.float32, "cpu"), mask, count, names, context)
    assert isinstance(model, Runner)
    run = model if chosen is program else Runner(chosen, model.dtype, model.device)
    return _Stateless(run, mask, count, names, context)


def _check(ids: torch.Tensor, padding: torch.Tensor | None, count: int, unreadable: bool) -> None:
    if ids.dim() != 2 or 0 in ids.shape:
        raise ValueError(f"prompts are [B, S] with at least one token, not {list(ids.shape)}")
    if padding is not None:
        if padding.shape != ids.shape:
            raise ValueError(f"padding {list(padding.shape)} does not fit prompts {list(ids.shape)}")
        if not bool(padding[:, -1].all()) or bool((padding[:, 1:] < padding[:, :-1]).any()):
            raise ValueError("prompts are padded on the left: zeros, then ones up to the end")
    if count < 0:
        raise ValueError("max_new_tokens is at least 0")
    if unreadable:
        raise ValueError("stop strings need decode, which turns tokens into text; at least one was given")
