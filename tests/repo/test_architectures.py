"""No architecture is named outside the two places that speak to transformers: the graph alone decides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEAKS_TO_TRANSFORMERS = ("graphopt/frontend/pretrained.py", "graphopt/artifact/")
# Model types that are also terms of the field, used as such.
TERMS = {"beam", "encoder_decoder"}
CLASS_NAME = re.compile(r"^[A-Z]\w+(Config|Model|LMHeadModel|For[A-Z]\w+)$")


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Line and value of every string literal that is no docstring."""
    tree = ast.parse(source)
    bodies = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, bodies) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def named(source: str, types: set[str], classes: set[str]) -> list[tuple[int, str]]:
    """Literals that are a model type or a class of transformers."""
    return [
        (line, text)
        for line, text in literals(source)
        if (text in types and text not in TERMS) or (CLASS_NAME.match(text) and text in classes)
    ]


@pytest.fixture(scope="module")
def known() -> tuple[set[str], set[str]]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = {spelling for key in CONFIG_MAPPING for spelling in (key, key.replace("-", "_"))} - {"graphopt"}
    return types, set(dir(transformers))


def test_no_architecture_is_named(known: tuple[set[str], set[str]]) -> None:
    found = {}
    for folder in ("graphopt", "passes", "backends"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(SPEAKS_TO_TRANSFORMERS) and (hits := named(path.read_text(), *known)):
                found[name] = hits
    assert not found


def test_the_rule_would_see_one(known: tuple[set[str], set[str]]) -> None:
    source = '"""gpt2"""\nif config.model_type == "gpt2" or kind in {"LlamaForCausalLM": 1, "ForCausalLM": 2}: pass\n'
    assert named(source, *known) == [(2, "gpt2"), (2, "LlamaForCausalLM")]
