"""Calibration and evaluation text: cutting tokens into batches, next-token loss, perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.run import bind_inputs, runnable
from graphopt.observe.distributed import gathered, mine, world
from graphopt.observe.stream import Limits, Visit, cut, stream

Batch = dict[str, torch.Tensor]
Run = Callable[..., tuple[torch.Tensor, ...]]


def token_batches(
    tokens: torch.Tensor | Sequence[torch.Tensor], samples: int, seq: int, batch: int = 1, seed: int = 0
) -> list[Batch]:
    """Cut `samples` sequences of `seq` tokens, evenly spread over the text, into batches with `input_ids` `[B, S]`.

    A single tensor `[N]` is one text: it is divided into `samples` equal stretches, and the seed places one sequence in
    each, so that none overlap. From a list of documents whole sequences are taken without crossing a boundary; a
    document shorter than `seq` gives one padded sequence, and its batch an `attention_mask`. Raises PlanError when the
    text is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(tokens, torch.Tensor):
        rows = _stretches(tokens, samples, seq, generator)
    else:
        rows = _windows(tokens, samples, seq)
    return [_pad(rows[i : i + batch]) for i in range(0, samples, batch)]


def _stretches(tokens: torch.Tensor, samples: int, seq: int, generator: torch.Generator) -> list[torch.Tensor]:
    total = len(tokens)
    if total < samples * seq:
        raise _too_short(f"{total} tokens", total // seq, samples, seq)
    rows = []
    for i in range(samples):
        first, stop = i * total // samples, (i + 1) * total // samples
        start = first + int(torch.randint(stop - first - seq + 1, (), generator=generator))
        rows.append(tokens[start : start + seq])
    return rows


def _windows(documents: Sequence[torch.Tensor], samples: int, seq: int) -> list[torch.Tensor]:
    pool = [
        document[start : start + seq]
        for document in documents
        if len(document) >= 2
        for start in range(0, max(len(document) - seq, 0) + 1, seq)
    ]
    if len(pool) < samples:
        raise _too_short(f"{len(documents)} documents", len(pool), samples, seq)
    return [pool[i * len(pool) // samples] for i in range(samples)]


def _too_short(have: str, most: int, samples: int, seq: int) -> PlanError:
    return PlanError.of(
        "text_too_short",
        f"the text of {have} does not hold {samples} sequences of {seq} tokens",
        notes=(f"it holds {most}",),
        help=(f"ask for at most {most} samples, or for shorter ones",) if most else ("give more text",),
    )


def _pad(rows: list[torch.Tensor]) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}


def token_input(program: Program) -> str:
    """Name of the input that takes token ids; raises PlanError when there is none."""
    for spec in program.entry.inputs:
        if spec.role == "tokens":
            return spec.name
    names = [spec.name for spec in program.entry.inputs]
    raise PlanError.of("no_tokens", f"this program takes {names} and no tokens, so it has no next-token loss")


def next_token_loss(
    logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed next-token cross-entropy in nats and number of predictions for each sample, both float64 `[B]`.

    logits `[B, S, V]`, ids `[B, S]`; a prediction counts when `mask` `[B, S]` holds both its position and its target.
    """
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    losses, counts = [], []
    for row, target, here in zip(logits, ids, counted, strict=True):
        both = here[1:] & here[:-1]
        each = torch.nn.functional.cross_entropy(row[:-1].to(torch.float64), target[1:], reduction="none")
        losses.append(each[both].sum())
        counts.append(both.sum())
    return torch.stack(losses), torch.stack(counts).to(torch.float64)


def perplexity(
    program: Program | Run, batches: Iterable[Mapping[str, Any]], limits: Limits | None = None
) -> tuple[float, int]:
    """Mean next-token loss in nats and the number of predicted tokens; the perplexity is exp of the first.

    `program` is a Program (run in float32) or a callable such as `Program.module()` gives, whose first result is logits
    `[B, S, V]`. With `limits` a Program runs as a stream, block by block, and the loss keeps its bits. Losses are summed
    in float64. Under torch.distributed each process runs its share of the batches and all get the same bits as one
    alone. Raises PlanError when no token is predicted or the loss is not finite.
    """
    owner = program if isinstance(program, Program) else getattr(program, "program", None)
    name = token_input(owner) if isinstance(owner, Program) else "input_ids"
    padding = "attention_mask"
    if isinstance(owner, Program):
        padding = next((spec.name for spec in owner.entry.inputs if spec.role == "padding"), padding)
    every = list(batches) if world() > 1 or limits is not None else None
    share: Iterable[Mapping[str, Any]] = batches if every is None else [every[i] for i in mine(len(every))]
    found: list[tuple[float, int]] = []

    def add(batch: Mapping[str, Any], logits: torch.Tensor) -> None:
        losses, counts = next_token_loss(logits, batch[name], batch.get(padding))
        found.append((float(losses.sum()), int(counts.sum())))

    with torch.no_grad():
        if isinstance(program, Program) and limits is not None:
            _stream_logits(program, list(share), limits, add)
        else:
            run = program.module() if isinstance(program, Program) else program
            for batch in share:
                add(batch, run(**batch)[0])
    total, count = 0.0, 0
    for part in gathered(found):
        for loss, number in part:
            total, count = total + loss, count + number
    if count == 0:
        raise PlanError.of("text_too_short", "the evaluation text holds no token to predict")
    if not torch.isfinite(torch.tensor(total)):
        raise PlanError.of("not_finite", "the loss on the evaluation text is not finite")
    return total / count, count


def _stream_logits(
    program: Program,
    batches: list[Mapping[str, Any]],
    limits: Limits,
    act: Callable[[Mapping[str, Any], torch.Tensor], None],
) -> None:
    graph = runnable(program, torch.float32, "cpu")
    names = [node.name for node in program.graph.graph.nodes if "input" in node.meta]
    inputs = [dict(zip(names, bind_inputs(program, dict(batch), "cpu"), strict=True)) for batch in batches]
    visit = Visit((program.output_nodes[0].name,), lambda i, values: act(batches[i], values[0]))
    segments = cut(program, graph, [visit], dtype=torch.float32, limits=limits)
    stream(program, segments, inputs, dtype=torch.float32, limits=limits)
