"""Reading safetensors checkpoints lazily: one tensor, or some rows of one, at a time; never a pickle.

8-bit floats come in two forms. Without scales a tensor is its values. With a scale beside it the tensor times the scale
is meant, and that product is what this source gives, in the scale's own dtype or wider.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from graphopt.diagnostics import ArtifactError
from graphopt.frontend.shards import DTYPES, Shard
from graphopt.ir.program import Program

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What writers of 8-bit checkpoints call the factor of `X.weight`; both spellings multiply.
SCALES = ("_scale_inv", "_scale")
# Endings of integer-packed weights, named only to say why a tensor is missing.
_PACKED = (".qweight", ".weight_packed", ".absmax", ".SCB")
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


class CheckpointSource:
    """The tensors of a checkpoint directory: `model.safetensors`, or shards listed by `model.safetensors.index.json`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open = lru_cache(maxsize=None)(Shard)
        self._files = self._locate(directory)
        self._scales = self._find_scales()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors on disk, those excepted that only scale another."""
        used = set(self._scales.values())
        return tuple(name for name in self._files if name not in used)

    @property
    def scaled(self) -> tuple[str, ...]:
        """Tensors that are stored as 8-bit values with a scale."""
        return tuple(self._scales)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far."""
        return sum(self._open(path).bytes_read for path in set(self._files.values()))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(
            held.stop - held.start for path in set(self._files.values()) for held in self._open(path).held.values()
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header."""
        return self._shard(name).held[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as it is read; a scaled one's is that of its scale."""
        if name in self._scales:
            return self.dtype(self._scales[name])
        kind = self._shard(name).held[name].kind
        return DTYPES.get(kind, torch.uint8)

    def identity(self, name: str) -> str:
        """What tells a tensor's bytes from those of another or of a changed file."""
        own = self._shard(name).identity(name)
        return f"{own} {self.identity(self._scales[name])}" if name in self._scales else own

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor; raises KeyError when it is not in the checkpoint, ArtifactError when it cannot be read."""
        value = self._shard(name).read(name)
        return self._times_scale(name, value, 0) if name in self._scales else value

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read rows `start` to `stop` of a tensor and no others; raises as `get` does."""
        value = self._shard(name).read(name, start, stop)
        return self._times_scale(name, value, start) if name in self._scales else value

    def fit(self, program: Program, reader: str) -> Program:
        """The program with what this checkpoint holds beyond it as `weights.extra`; copies of tied tensors are none.

        Raises ArtifactError when tensors are missing, or have other shapes than `reader` says.
        """
        store = program.weights
        wanted = {name: weight for name, weight in store.weights.items() if weight.kind != "constant"}
        there = set(self.names)
        missing = [name for name in wanted if name not in there]
        if missing:
            quantised = [name for name in self._files if name.endswith(_PACKED)]
            help = (f"{quantised[0]!r} looks packed: unpack the checkpoint first",) if quantised else ()
            raise ArtifactError.of(
                "missing_tensors",
                f"{self.directory} lacks {len(missing)} tensors that the model reads, the first {missing[0]!r}",
                notes=(f"on disk: {len(there)} tensors, the first {min(there, default='none')!r}",),
                help=help,
            )
        wrong = [name for name, weight in wanted.items() if self.shape(name) != weight.expr.shape]
        if wrong:
            raise ArtifactError.of(
                "wrong_shape",
                f"tensor {wrong[0]!r} is {list(self.shape(wrong[0]))} on disk,"
                f" but {reader} {list(wanted[wrong[0]].expr.shape)}",
                notes=(f"{len(wrong)} tensors differ",) if len(wrong) > 1 else (),
            )
        used = set(wanted) | {alias for weight in wanted.values() for alias in weight.aliases}
        extra = tuple(name for name in self.names if name not in used)
        return replace(program, weights=replace(store, extra=extra))

    def _shard(self, name: str) -> Shard:
        return self._open(self._files[name])

    def _find_scales(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for name in self._files:
            if DTYPES.get(self._shard(name).held[name].kind) not in _EIGHT_BITS:
                continue
            scale = next((name + end for end in SCALES if name + end in self._files), None)
            if scale is not None:
                self._check_scale(name, scale)
                found[name] = scale
        return found

    def _check_scale(self, name: str, scale: str) -> None:
        """A factor for the tensor, for each row, or for each block of a grid whose blocks have one size."""
        shape, by = self.shape(name), self.shape(scale)
        fits = by in ((), (1,)) or (len(shape) >= 1 and by in ((shape[0],), (shape[0], 1)))
        if not fits and len(shape) == 2 and len(by) == 2 and all(by) and all(shape):
            fits = all(-(-size // _block(size, count)) == count for size, count in zip(shape, by, strict=True))
        if not fits:
            raise ArtifactError.of(
                "scale_not_understood",
                f"{name!r} {list(shape)} is scaled by {scale!r} {list(by)}",
                notes=("understood: one factor, one for each row, one for each block of a grid",),
            )

    def _times_scale(self, name: str, value: torch.Tensor, start: int) -> torch.Tensor:
        scale = self.get(self._scales[name])
        wide = torch.promote_types(scale.dtype, torch.float32)
        scale = scale.to(wide)
        shape = self.shape(name)
        if scale.numel() == 1:
            scale = scale.reshape(())
        elif scale.shape in ((shape[0],), (shape[0], 1)):
            scale = scale.reshape(-1, *[1] * (value.dim() - 1))[start : start + value.shape[0]]
        else:
            high, broad = (_block(size, count) for size, count in zip(shape, scale.shape, strict=True))
            line = torch.arange(start, start + value.shape[0]) // high
            scale = scale[line][:, torch.arange(shape[1]) // broad]
        return value.to(wide) * scale

    def _locate(self, directory: Path) -> Mapping[str, Path]:
        index = directory / INDEX
        if index.is_file():
            return self._indexed(index, directory.resolve())
        single = directory / SINGLE
        if single.is_file():
            return dict.fromkeys(self._open(single).held, single)
        found = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
        hint = (f"found {', '.join(found)}: pickles are never loaded; convert them to safetensors",) if found else ()
        raise ArtifactError.of("no_weights", f"{directory} holds no {SINGLE} and no index", help=hint)

    def _indexed(self, index: Path, root: Path) -> Mapping[str, Path]:
        try:
            entries = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ArtifactError.of("bad_index", f"{index} is no index of tensors: {error}") from error
        located = {}
        for name, file in entries.items():
            if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
                raise ArtifactError.of("path_outside", f"{index} maps {name!r} to {file!r}, outside the checkpoint")
            located[name] = (root / file).resolve()
        absent = sorted({path.name for path in located.values() if not path.is_file()})
        if absent:
            raise ArtifactError.of(
                "missing_shards",
                f"{root} lacks {len(absent)} of the files that {index.name} lists, the first {absent[0]!r}",
                help=("copy them from where the checkpoint came from",),
            )
        for name, path in located.items():
            if name not in self._open(path).held:
                raise ArtifactError.of(
                    "missing_tensors", f"{index.name} says that {path.name} holds {name!r}, but it does not"
                )
        return located


def _block(size: int, count: int) -> int:
    """The size of the blocks that divide `size` into `count`, the last one perhaps smaller; a power of two if one fits."""
    least = -(-size // count)
    power = 1 << (least - 1).bit_length()
    return power if -(-size // power) == count else least
