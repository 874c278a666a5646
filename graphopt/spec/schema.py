"""The JSON Schema of specs, for editors."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from graphopt.spec.load import Registry
from graphopt.spec.model import Spec, StepHead


def json_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a whole spec, with one form of step for each registered pass."""
    passes = {name: registry.get(name) for name in sorted(registry.names())}
    models: list[type[BaseModel]] = list(dict.fromkeys((Spec, StepHead, *passes.values())))
    names, together = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = together["$defs"]

    def definition(model: type[BaseModel]) -> dict[str, Any]:
        found: dict[str, Any] = definitions[names[model, "validation"]["$ref"].rpartition("/")[2]]
        return found

    head = definition(StepHead)["properties"]
    forms = [_from_step(), *(_step(name, head, model, definition(model)) for name, model in passes.items())]
    spec = definition(Spec)
    used = {key: value for key, value in definitions.items() if value not in (spec, definition(StepHead))}
    spec = {**spec, "properties": {**spec["properties"], "steps": {"type": "array", "items": {"oneOf": forms}}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "graphopt spec",
        **{key: value for key, value in spec.items() if key != "title"},
        "$defs": used,
    }


def _from_step() -> dict[str, Any]:
    return {
        "title": "from",
        "description": "The steps of another spec, exactly here.",
        "type": "object",
        "properties": {"from": {"type": "string"}},
        "required": ["from"],
        "additionalProperties": False,
    }


def _step(name: str, head: dict[str, Any], model: type[BaseModel], own: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": name,
        "description": inspect.cleandoc(model.__doc__ or ""),
        "type": "object",
        "properties": {**head, "use": {"const": name}, **own.get("properties", {})},
        "required": ["use", *own.get("required", [])],
        "additionalProperties": False,
    }
