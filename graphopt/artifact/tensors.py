"""Safetensors written as a stream: one tensor in memory at a time, sharded with an index above a size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.diagnostics import ArtifactError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its shape and dtype are known before `make` computes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    finite: bool = True

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def write_sharded(directory: Path, stem: str, entries: Mapping[str, Entry], shard_size: int) -> None:
    """Write `stem.safetensors`, or shards of at most `shard_size` bytes (a larger tensor has its own) and their index.

    Raises ArtifactError when a value is not finite.
    """
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.bytes > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.bytes
    if len(shards) == 1:
        return write_file(directory / f"{stem}.safetensors", shards[0])
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard)
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(e.bytes for e in entries.values())}, "weight_map": files}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def write_file(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write one safetensors file, evaluating and checking one tensor at a time."""
    # The format wants every tensor aligned to its own itemsize, which falling sizes give.
    ordered = sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in ordered:
        if entry.dtype not in _NAMES:
            raise ArtifactError.of("dtype_not_stored", f"safetensors cannot hold {name!r} as {entry.dtype}")
        span = [offset, offset := offset + entry.bytes]
        header[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, entry in ordered:
            file.write(_checked(name, entry).reshape(-1).view(torch.uint8).numpy().data)


def _checked(name: str, entry: Entry) -> torch.Tensor:
    value = entry.make().detach().to("cpu", entry.dtype).contiguous()
    if tuple(value.shape) != entry.shape:
        raise ArtifactError.of("wrong_shape", f"{name!r} evaluates to {list(value.shape)}, not {list(entry.shape)}")
    if entry.finite and value.dtype.is_floating_point:
        bad = int((~torch.isfinite(value.float())).sum())
        if bad:
            raise ArtifactError.of(
                "not_finite",
                f"{name!r} has {bad} values of {value.numel()} that are NaN or infinite in {value.dtype}",
                help=("nothing was written; find the step that made them",),
            )
    return value
