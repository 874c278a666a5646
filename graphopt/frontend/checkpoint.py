"""Reading safetensors checkpoints lazily: one tensor at a time, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from graphopt.diagnostics import ArtifactError


class CheckpointSource:
    """The tensors of a checkpoint directory: `model.safetensors`, or shards listed by `model.safetensors.index.json`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = _locate(directory)
        self._open = lru_cache(maxsize=16)(self._open_file)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors on disk."""
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor; raises KeyError when it is not in the checkpoint, ArtifactError when it cannot be read."""
        try:
            value: torch.Tensor = self._open(self._files[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError.of(
                "unreadable_weights",
                f"cannot read tensor {name!r} from {self._files[name]}: {error}",
                help=("the file is damaged or incomplete: copy it again",),
            ) from error
        return value

    def _open_file(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ArtifactError.of(
                "unreadable_weights",
                f"{path} is not a whole safetensors file: {error}",
                help=("the file is damaged or truncated: copy it again",),
            ) from error


def _locate(directory: Path) -> Mapping[str, Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        entries = json.loads(index.read_text())["weight_map"]
        root = directory.resolve()
        located = {}
        for name, file in entries.items():
            path = (root / file).resolve()
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ArtifactError.of("path_outside", f"{index} maps {name!r} to {file!r}, outside the checkpoint")
            located[name] = path
        return located
    if single.is_file():
        try:
            with safe_open(str(single), framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise ArtifactError.of(
                "unreadable_weights",
                f"{single} is not a whole safetensors file: {error}",
                help=("the file is damaged or truncated: copy it again",),
            ) from error
    found = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    hint = (f"found {', '.join(found)}: pickles are never loaded; convert them to safetensors",) if found else ()
    raise ArtifactError.of("no_weights", f"{directory} holds no model.safetensors and no index", help=hint)
