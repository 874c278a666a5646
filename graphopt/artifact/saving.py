"""Saving a Program: a stock transformers checkpoint when its graph proves to be one, else a graphopt checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from graphopt.artifact import native
from graphopt.artifact.directory import check_target, replacing
from graphopt.artifact.native_names import TRAIL_FILE
from graphopt.artifact.stock import Stock, find_stock, refuse
from graphopt.artifact.tensors import Entry, write_sharded
from graphopt.artifact.trail import trail_to_json
from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.text import fingerprint

Format = Literal["auto", "transformers", "graphopt"]
SHARD_SIZE = 4 << 30
# Companions are data that tokenizers and generate() read: named one by one, so that no code and no pickle travels.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
    "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
_SLACK = 1 << 20


@dataclass(frozen=True)
class SaveReport:
    """What was written: `format` is the one used, `reasons` say why a stock checkpoint was not possible."""

    directory: Path
    format: str
    reasons: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    parameters: int
    dtype: torch.dtype
    fingerprint: str
    zeros: tuple[str, ...] = ()


def save(
    program: Program,
    directory: str | Path,
    *,
    format: Format = "auto",
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    also: Callable[[Path], object] | None = None,
) -> SaveReport:
    """Write a checkpoint that `load` and `AutoModelForCausalLM.from_pretrained` read, in one step or not at all.

    `dtype` rounds floating weights once more. `overwrite` replaces an artifact that graphopt wrote. `also` may write
    more files into the directory before it appears under its name. Raises
    ArtifactError when the target may not be written, weights are not finite, the disk is full, or `format` is
    `transformers` and no stock config expresses the program (its notes say why).
    """
    if format not in ("auto", "transformers", "graphopt"):
        raise ArtifactError.of("bad_format", f"unknown format {format!r}: auto, transformers or graphopt")
    target = check_target(directory, source=program.origin.path, overwrite=overwrite)
    stock = find_stock(program) if format != "graphopt" else ("the graphopt format was asked for",)
    if isinstance(stock, Stock):
        return _write(program, target, stock, (), dtype, shard_size, also)
    if format == "transformers":
        raise refuse(stock)
    return _write(program, target, None, stock, dtype, shard_size, also)


def _write(
    program: Program,
    target: Path,
    stock: Stock | None,
    reasons: tuple[str, ...],
    dtype: torch.dtype | None,
    shard_size: int,
    also: Callable[[Path], object] | None,
) -> SaveReport:
    saved = program if stock is not None or dtype is None else native.recast(program, dtype)
    entries = _stock_entries(program, stock, dtype) if stock is not None else native.weight_entries(saved)
    needed = sum(entry.bytes for entry in entries.values()) + _SLACK
    with replacing(target, needed) as temporary:
        if stock is not None:
            _write_config(stock.config, program, dtype, temporary)
        else:
            native.write_graph(saved, temporary)
        _copy_companions(program, temporary, cached=stock is not None)
        (temporary / TRAIL_FILE).write_text(trail_to_json(program.trail))
        write_sharded(temporary, "model", entries, shard_size)
        if also is not None:
            also(temporary)
        files = tuple(sorted(path.name for path in temporary.iterdir()))
        size = sum(path.stat().st_size for path in temporary.iterdir())
    zeros = tuple(name for name, bound in stock.binding.items() if bound is None) if stock is not None else ()
    kind = "graphopt" if stock is None else "transformers"
    parameters, mark = program.weights.parameters, fingerprint(saved)
    return SaveReport(target, kind, reasons, files, size, parameters, dtype or program.dtype, mark, zeros)


def _stock_entries(program: Program, stock: Stock, dtype: torch.dtype | None) -> dict[str, Entry]:
    entries = {}
    for name, bound in stock.binding.items():
        shape, kind = stock.shapes[name]
        stored = dtype if dtype is not None and kind.is_floating_point else kind
        entries[name] = Entry(shape, stored, _reader(program, bound, shape, kind))
    return entries


def _reader(program: Program, bound: str | None, shape: tuple[int, ...], kind: torch.dtype) -> Any:
    if bound is None:
        return lambda: torch.zeros(shape, dtype=kind)
    return lambda: program.weights.evaluate(bound)


def _write_config(config: Any, program: Program, dtype: torch.dtype | None, directory: Path) -> None:
    config.architectures = [program.origin.architecture]
    config.dtype = dtype or program.dtype
    config.to_json_file(directory / "config.json")


def _copy_companions(program: Program, directory: Path, *, cached: bool) -> None:
    """Copy tokenizer and generation files; a graphopt checkpoint generates without a cache and says so."""
    origin = Path(program.origin.path) if program.origin.path is not None else None
    for name in COMPANIONS:
        if origin is not None and (origin / name).is_file() and not (directory / name).exists():
            shutil.copyfile(origin / name, directory / name)
    generation = directory / "generation_config.json"
    if not cached:
        settings: Mapping[str, Any] = json.loads(generation.read_text()) if generation.is_file() else {}
        ids = {key: value for key, value in native.token_ids(program).items() if value is not None}
        generation.write_text(json.dumps({**ids, **settings, "use_cache": False}, indent=2) + "\n")
