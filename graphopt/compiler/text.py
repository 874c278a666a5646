"""Text for calibration and evaluation: files to tokens, programs to perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.observe.stream import Limits
from graphopt.observe.text import perplexity, token_batches
from graphopt.train.data import ANSWERS
from graphopt.views.trace import derives_from


def load_text(path: str | Path, tokenizer_dir: str | Path | None) -> torch.Tensor:
    """Tokens `[N]` of a text file, or of the `text` field of each line of a .jsonl file.

    Raises PlanError when the model has no tokenizer.json or the file holds no text.
    """
    file = Path(path)
    if file.suffix == ".npy":
        import numpy as np

        return torch.from_numpy(np.load(file, allow_pickle=False).astype("int64")).reshape(-1)
    tokenizer_file = Path(tokenizer_dir) / "tokenizer.json" if tokenizer_dir else None
    if tokenizer_file is None or not tokenizer_file.is_file():
        raise PlanError.of(
            "no_tokenizer",
            f"{file} is text, but the model has no tokenizer.json beside its weights",
            help=("put tokenizer.json into the model directory, or give token ids as .npy",),
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    try:
        raw = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError.of("unreadable_text", f"cannot read {file}: {error}") from error
    documents = (
        [json.loads(line)["text"] for line in raw.splitlines() if line.strip()] if file.suffix == ".jsonl" else [raw]
    )
    tokens = [token for document in documents for token in tokenizer.encode(document).ids]
    if not tokens:
        raise PlanError.of("empty_text", f"{file} holds no text")
    return torch.tensor(tokens, dtype=torch.int64)


def batches(
    program: Program, data: str | Path, samples: int, seq: int, batch: int = 1, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Calibration or evaluation batches of a text for a program, `input_ids` `[batch, seq]` each."""
    made: list[dict[str, torch.Tensor]] = token_batches(tokens_of(program, data), samples, seq, batch, seed)
    return made


def training_data(program: Program, data: str | Path) -> torch.Tensor | dict[str, torch.Tensor]:
    """What a program trains on: tokens `[N]` of a text, or the rows of a .safetensors file by the names of its inputs.

    Rows may be marked by `answers` `[N, S]`, true at tokens that are to be predicted. Raises PlanError when the file does
    not fit the program.
    """
    file = Path(data)
    if file.suffix != ".safetensors":
        return tokens_of(program, data)
    try:
        rows: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise PlanError.of("unreadable_text", f"cannot read {file}: {error}") from error
    known = [spec.name for spec in program.entry.inputs]
    unknown = sorted(set(rows) - {*known, ANSWERS})
    if unknown:
        raise PlanError.of(
            "examples",
            f"{file} holds {unknown[0]!r}, but the program takes {', '.join(known)}",
            notes=(f"and {ANSWERS}",),
        )
    return rows


def tokens_of(program: Program, data: str | Path) -> torch.Tensor:
    """Tokens `[N]` of a text for a program; raises PlanError when its embedding does not have them all."""
    tokens = load_text(data, program.origin.path)
    vocabulary = _vocabulary(program)
    if vocabulary is not None and int(tokens.max()) >= vocabulary:
        raise PlanError.of(
            "wrong_tokenizer", f"{data} holds token {int(tokens.max())}, but the embedding has {vocabulary} rows"
        )
    return tokens


def evaluate(
    program: Program,
    data: str | Path,
    samples: int = 64,
    seq: int = 256,
    batch: int = 8,
    tell: Callable[[int], object] | None = None,
    limits: Limits | None = None,
) -> dict[str, float | int]:
    """Perplexity of a program on a text: nats a token, its exponential, and how many tokens were predicted.

    `tell(n)` is called when n more sequences begin; with `limits` the program runs as a stream.
    """

    def told() -> Iterator[dict[str, torch.Tensor]]:
        for inputs in batches(program, data, samples, seq, batch):
            if tell is not None:
                tell(len(next(iter(inputs.values()))))
            yield inputs

    nats, count = perplexity(program, told(), limits)
    return {"nats_per_token": nats, "perplexity": math.exp(nats), "tokens": count}


def _vocabulary(program: Program) -> int | None:
    tokens = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and derives_from(node.args[1], tokens):
            rows: Any = node.args[0].meta["val"].shape[0]
            return int(rows)
    return None
