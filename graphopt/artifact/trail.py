"""The trail of a program as JSON: what every step did, declined, proved and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Applied

VERSION = 1
MOST_CHARACTERS = 1 << 26


def trail_to_json(trail: tuple[Applied, ...]) -> str:
    """The trail as JSON text; tuples become lists and values without a JSON form their text."""
    steps = [{each.name: _plain(getattr(step, each.name)) for each in fields(Applied)} for step in trail]
    return json.dumps({"graphopt_trail": VERSION, "steps": steps}, indent=1, sort_keys=True) + "\n"


def trail_from_json(text: str, file: str = "trail.json") -> tuple[Applied, ...]:
    """The trail that `trail_to_json` wrote.

    Raises ArtifactError when it is no trail of this version.
    """
    try:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"longer than {MOST_CHARACTERS} characters")
        data = json.loads(text)
        if data["graphopt_trail"] != VERSION:
            raise ValueError(f"version {data['graphopt_trail']!r}, this graphopt reads {VERSION}")
        names = {each.name for each in fields(Applied)}
        steps: list[dict[str, Any]] = [
            {key: tuple(v) if isinstance(v, list) else v for key, v in step.items()} for step in data["steps"]
        ]
        unknown = {key for step in steps for key in step} - names
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return tuple(Applied(**step) for step in steps)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError.of("bad_trail", f"{file} is no trail: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
