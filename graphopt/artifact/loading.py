"""Loading any checkpoint as a Program."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from graphopt.artifact.native import read_program
from graphopt.artifact.native_names import MODEL_TYPE, TRAIL_FILE
from graphopt.artifact.trail import trail_from_json
from graphopt.diagnostics import ArtifactError
from graphopt.frontend import capture_pretrained
from graphopt.ir.program import Program


def load(directory: str | Path) -> Program:
    """A Program from a checkpoint: graphopt ones are parsed, stock ones (hub ids included) captured; trails come along.

    Raises ArtifactError when files are missing or damaged, CaptureError when a stock model cannot be captured.
    """
    path = Path(directory)
    program = _read(path) if path.is_dir() else capture_pretrained(directory)
    trail = path / TRAIL_FILE
    if not trail.is_file():
        return program
    return replace(program, trail=trail_from_json(trail.read_text(encoding="utf-8"), str(trail)))


def _read(path: Path) -> Program:
    file = path / "config.json"
    if not file.is_file():
        raise ArtifactError.of("no_config", f"{path} holds no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError.of("bad_config", f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError.of("bad_config", f"{file} holds no mapping")
    return read_program(path, config) if config.get("model_type") == MODEL_TYPE else capture_pretrained(path)
