"""`spec.lock.yaml`: what was run, from which files, with which versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from graphopt.diagnostics import ArtifactError, Place, SpecError
from graphopt.spec.load import LoadedSpec, used_data
from graphopt.spec.paths import not_found
from graphopt.spec.scalars import ScalarError, resolve_plain
from graphopt.spec.yaml import MapNode, decode, parse_yaml, plain

VERSION = 1
PACKAGES = (
    "graphopt",
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "networkx",
    "sympy",
    "pydantic",
    "PyYAML",
)


@dataclass(frozen=True, slots=True)
class Lock:
    """The contents of a lock file."""

    spec: dict[str, Any]
    files: dict[str, str]
    packages: dict[str, str]
    facts: dict[str, Any]

    def changed_files(self) -> tuple[str, ...]:
        """Return the locked files that are gone or hold something else now."""
        return tuple(path for path, digest in self.files.items() if _digest_or_none(path) != digest)


def write_lock(path: str | Path, loaded: LoadedSpec, facts: Mapping[str, Any]) -> Lock:
    """Write the lock file of a run, whole or not at all; a failure raises ArtifactError or SpecError."""
    lock = Lock(loaded.resolved(), _files(loaded), _packages(), dict(facts))
    values = {"lock": VERSION, "spec": lock.spec, "files": lock.files, "packages": lock.packages, "facts": lock.facts}
    try:
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=2**30)
    except yaml.YAMLError as error:
        raise ArtifactError.of("bad_facts", f"a lock holds plain data only: {error}") from None
    try:
        _write_whole(Path(path), text.encode())
    except OSError as error:
        raise ArtifactError.of("write_failed", f"cannot write '{path}': {error.strerror}") from error
    return lock


def read_lock(path: str | Path) -> Lock:
    """Return the contents of a lock file; one that cannot be understood raises SpecError."""
    try:
        text = decode(Path(path).read_bytes(), str(path))
    except OSError:
        raise SpecError(not_found(str(path), None)) from None
    document = parse_yaml(text, str(path))
    if document.problems:
        raise SpecError(*document.problems)
    place = Place(str(path), 1, 1)
    values = plain(document.root) if isinstance(document.root, MapNode) else {}
    if values.get("lock") != VERSION:
        raise SpecError.of("bad_lock", f"not a lock file of version {VERSION}", place)
    parts: list[Any] = [values.get(key) for key in ("spec", "files", "packages", "facts")]
    if not all(isinstance(part, dict) for part in parts):
        raise SpecError.of("bad_lock", "a lock file holds spec, files, packages and facts", place)
    return Lock(*parts)


class _Dumper(yaml.SafeDumper):
    """Writes what our own reader takes: no aliases, and quotes around text that YAML 1.2 reads as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        ambiguous = not isinstance(resolve_plain(text), str)
    except ScalarError:
        ambiguous = True
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if ambiguous or text == "<<" else None)


_Dumper.add_representer(str, _represent_text)


def _files(loaded: LoadedSpec) -> dict[str, str]:
    digests = {file.path: file.sha256 for file in loaded.files}
    for section, data in used_data(loaded).items():
        digest = _digest_or_none(data)
        if digest is None:
            raise SpecError(not_found(data, loaded.place_of(section, "data")))
        digests[data] = digest
    return digests


def _digest_or_none(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _write_whole(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
