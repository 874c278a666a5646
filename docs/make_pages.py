"""Write docs/passes/: one page a pass, from its docstring and its options. Run by `make docs`; a test checks freshness."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from graphopt.passkit import Pass, PassRegistry

PAGES = Path(__file__).resolve().parent / "passes"


def option_rows(pass_class: type[Pass]) -> list[str]:
    """Markdown table rows of a pass's options: name, what it may be, default, meaning."""
    schema: dict[str, Any] = pass_class.model_json_schema()
    rows = []
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", [])
        default = "required" if required else f"`{_default(field.get('default'))}`"
        rows.append(f"| `{name}` | {_kind(field, schema)} | {default} | {field.get('description', '')} |")
    return rows


def _default(value: Any) -> str:
    """The shortest YAML of a default: a block by its kind when its options are their own defaults."""
    if isinstance(value, dict) and "kind" in value:
        return str(value["kind"])
    return "none" if value is None else str(value)


def _kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in field:
        target = schema["$defs"][field["$ref"].rsplit("/", 1)[-1]]
        return _kind(target, schema)
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_kind(choice, schema) for choice in field[key]))
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}), schema)}"
    if field.get("type") == "object" and "properties" in field:
        kind = field["properties"].get("kind", {}).get("const")
        inner = ", ".join(name for name in field["properties"] if name != "kind")
        return f"`{{kind: {kind}{', ' + inner if inner else ''}}}`" if kind else f"`{{{inner}}}`"
    kind = field.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def page(name: str, pass_class: type[Pass]) -> str:
    """One page in Markdown."""
    text = inspect.cleandoc(pass_class.__doc__ or "")
    module = inspect.cleandoc(inspect.getmodule(pass_class).__doc__ or "")  # type: ignore[union-attr]
    facts = [
        f"needs {', '.join(sorted(pass_class.needs))}" if pass_class.needs else "",
        f"not on {', '.join(sorted(pass_class.forbids))} programs" if pass_class.forbids else "",
    ]
    lines = [
        f"# {name}",
        "",
        module,
        "",
        text,
        "",
        f"Effect: `{pass_class.effect}`. Order: {'; '.join(fact for fact in facts if fact)}.",
        "",
        "| option | values | default | meaning |",
        "|---|---|---|---|",
        *option_rows(pass_class),
        "",
        "Every step also takes `where: {layers: 1..-2, paths: [...]}`, `id` and `optional`.",
        "",
    ]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """All pages by file name, the index included."""
    registry = PassRegistry()
    made = {f"{name}.md": page(name, registry.get(name)) for name in registry.names()}
    index = ["# Passes", ""]
    for name in registry.names():
        summary = inspect.cleandoc(registry.get(name).__doc__ or "").splitlines()[0]
        index.append(f"- [{name}]({name}.md): {summary}")
    return {**made, "README.md": "\n".join([*index, ""])}


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for file, text in pages().items():
        (PAGES / file).write_text(text)
        print(PAGES / file)
