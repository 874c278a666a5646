"""Saving a Program: a stock transformers checkpoint when its graph proves to be one, else a graphopt checkpoint."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from graphopt.artifact import native
from graphopt.artifact.directory import check_target, replacing
from graphopt.artifact.journal import Journal
from graphopt.artifact.native_names import TRAIL_FILE
from graphopt.artifact.stock import Stock, find_stock, refuse
from graphopt.artifact.tensors import Entry, write_sharded
from graphopt.artifact.trail import trail_to_json
from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.text import fingerprint
from graphopt.ir.weights import TensorSource, WeightStore, sources

Format = Literal["auto", "transformers", "graphopt"]
SHARD_SIZE = 4 << 30
# Bytes of tensors that several weights are made of and that wait for the last of them.
HELD = 512 << 20
# Companions are data that tokenizers and generate() read: named one by one, so that no code and no pickle travels.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json", "generation_config.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
_SLACK = 1 << 20


@dataclass(frozen=True)
class SaveReport:
    """What was written: `format` is the one used, `reasons` say why a stock checkpoint was not possible.

    `kept` are files that an earlier, killed save had finished; `extra` are tensors that the graph does not read and that
    were carried over; `bytes_read` counts what this save read of the source checkpoint.
    """

    directory: Path
    format: str
    reasons: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    parameters: int
    dtype: torch.dtype
    fingerprint: str
    zeros: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    bytes_read: int = 0


def save(
    program: Program,
    directory: str | Path,
    *,
    format: Format = "auto",
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
    overwrite: bool = False,
    also: Callable[[Path], object] | None = None,
    extra: bool = True,
) -> SaveReport:
    """Write a checkpoint that `load` and `AutoModelForCausalLM.from_pretrained` read, in one step or not at all.

    Tensors stream: some rows of one are in memory at a time. A save that is killed leaves a hidden directory beside
    `directory`, and the same save keeps the shards that were finished. `dtype` rounds floating weights once more.
    `overwrite` replaces an artifact that graphopt wrote. `also` may write more files into the directory before it
    appears under its name. `extra` carries over tensors of the checkpoint that the graph never read. Raises
    ArtifactError when the target may not be written, weights are not finite, the disk is full, or `format` is
    `transformers` and no stock config expresses the program (its notes say why).
    """
    if format not in ("auto", "transformers", "graphopt"):
        raise ArtifactError.of("bad_format", f"unknown format {format!r}: auto, transformers or graphopt")
    target = check_target(directory, source=program.origin.path, overwrite=overwrite)
    stock = find_stock(program) if format != "graphopt" else ("the graphopt format was asked for",)
    if isinstance(stock, Stock):
        return _write(program, target, stock, (), dtype, shard_size, also, extra)
    if format == "transformers":
        raise refuse(stock)
    return _write(program, target, None, stock, dtype, shard_size, also, extra)


def _write(
    program: Program,
    target: Path,
    stock: Stock | None,
    reasons: tuple[str, ...],
    dtype: torch.dtype | None,
    shard_size: int,
    also: Callable[[Path], object] | None,
    extra: bool,
) -> SaveReport:
    saved = program if stock is not None or dtype is None else native.recast(program, dtype)
    mark = fingerprint(saved)
    bound: set[str | None] = set(stock.binding.values() if stock is not None else saved.weights)
    store = _reading_once(saved.weights, bound)
    saved = replace(saved, weights=store)
    entries = _stock_entries(saved, stock, dtype) if stock is not None else native.weight_entries(saved)
    carried = {name: _carried(store, name) for name in (program.weights.extra if extra else ()) if name not in entries}
    entries |= carried
    needed = sum(entry.bytes for entry in entries.values()) + _SLACK
    before = _bytes_read(program)
    with replacing(target, needed) as temporary:
        journal = Journal(temporary)
        if stock is not None:
            _write_config(stock.config, program, dtype, temporary)
        else:
            native.write_graph(saved, temporary)
        _copy_companions(program, temporary, cached=stock is not None or program.cached)
        (temporary / TRAIL_FILE).write_text(trail_to_json(program.trail))
        write_sharded(temporary, "model", entries, shard_size, journal)
        if also is not None:
            also(temporary)
        journal.close()
        files = tuple(sorted(path.name for path in temporary.iterdir()))
        size = sum(path.stat().st_size for path in temporary.iterdir())
    return SaveReport(
        target,
        "graphopt" if stock is None else "transformers",
        reasons,
        files,
        size,
        program.weights.parameters,
        dtype or program.dtype,
        mark,
        tuple(name for name, found in stock.binding.items() if found is None) if stock is not None else (),
        tuple(journal.kept),
        tuple(carried),
        _bytes_read(program) - before,
    )


def _bytes_read(program: Program) -> int:
    return int(getattr(program.weights.source, "bytes_read", 0))


def _stock_entries(program: Program, stock: Stock, dtype: torch.dtype | None) -> dict[str, Entry]:
    entries = {}
    for name, bound in stock.binding.items():
        shape, kind = stock.shapes[name]
        stored = dtype if dtype is not None and kind.is_floating_point else kind
        if bound is None:
            zeros = Entry(shape, stored, lambda s=shape, k=kind: torch.zeros(s, dtype=k), key=lambda: "zeros")  # type: ignore[misc]
            entries[name] = zeros
        else:
            entries[name] = native.entry(program, bound, stored)
    return entries


def _carried(store: WeightStore, name: str) -> Entry:
    """An entry for a tensor of the checkpoint that the graph does not read, with its bytes as they are."""
    source: Any = store.source
    shape, dtype = source.shape(name), source.dtype(name)
    return Entry(shape, dtype, lambda: source.get(name), False, key=lambda: f"extra {source.identity(name)}")


class _Once:
    """A source that reads a tensor once although several weights are made of it, and holds it until the last has it."""

    def __init__(self, source: Any, readers: Counter[str]) -> None:
        self.source, self.readers = source, readers
        self.shared = frozenset(readers)
        self.held: dict[str, torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor:
        """The tensor, from the source the first time."""
        if name not in self.shared:
            return self.source.get(name)  # type: ignore[no-any-return]
        self.readers[name] -= 1
        value = self.held.pop(name) if name in self.held else self.source.get(name)
        if self.readers[name] > 0 and sum(held.nbytes for held in self.held.values()) + value.nbytes <= HELD:
            self.held[name] = value
        return value  # type: ignore[no-any-return]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows, of what is held where it is; the last rows end one reading."""
        if name in self.held:
            whole = self.held[name]
            if stop == len(whole):
                self.readers[name] -= 1
                if self.readers[name] <= 0:
                    del self.held[name]
            return whole[start:stop]
        read = getattr(self.source, "rows", None)
        return read(name, start, stop) if read is not None else self.source.get(name)[start:stop]  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _reading_once(store: WeightStore, names: set[str | None]) -> WeightStore:
    readers: Counter[str] = Counter()
    for name in names:
        if name is not None:
            readers.update(sources(store[name].expr))
    shared = Counter({name: count for name, count in readers.items() if count > 1})
    if store.source is None or not shared:
        return store
    source: TensorSource = _Once(store.source, shared)
    return replace(store, source=source)


def _write_config(config: Any, program: Program, dtype: torch.dtype | None, directory: Path) -> None:
    config.dtype = dtype or program.dtype
    config.to_json_file(directory / "config.json")


def _copy_companions(program: Program, directory: Path, *, cached: bool) -> None:
    """Copy tokenizer and generation files; a checkpoint of a graph without a cache says that it generates without one."""
    origin = Path(program.origin.path) if program.origin.path is not None else None
    for name in COMPANIONS:
        if origin is not None and (origin / name).is_file() and not (directory / name).exists():
            shutil.copyfile(origin / name, directory / name)
    generation = directory / "generation_config.json"
    if not cached:
        settings: Mapping[str, Any] = json.loads(generation.read_text()) if generation.is_file() else {}
        ids = {key: value for key, value in native.token_ids(program).items() if value is not None}
        generation.write_text(json.dumps({**ids, **settings, "use_cache": False}, indent=2) + "\n")
