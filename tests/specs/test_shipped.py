"""Every shipped spec runs on the shipped model, fully verified, and does what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

import graphopt
from graphopt.passkit import PassRegistry
from graphopt.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
FEW = [
    f"{text}.{name}={value}" for text in ("calibration", "evaluation") for name, value in (("samples", 6), ("seq", 96))
]
# Specs for models of another kind name none; tests of their own run them.
RUNNABLE = sorted(
    p for p in (ROOT / "specs").rglob("*.yaml") if p.parent.name != "models" and "extends: " in p.read_text()
)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_spec_runs_and_is_certified(path: Path) -> None:
    steps = load_spec(path, registry=PassRegistry()).steps
    short = [f"steps.{step.id}.recipe.steps=2" for step in steps if "recipe" in type(step.config).model_fields]
    reads = load_spec(path, registry=PassRegistry()).spec.evaluation is not None
    few = FEW if reads else []
    program = graphopt.compile(None, path, overrides=[*few, *short, *(["checks={}"] if short else [])])
    assert program.trail
    for step in program.trail:
        assert step.certificate["level"] == "full"
        grown = step.effect == "untrained" or step.options["use"] == "refactor_moe"
        assert step.after["parameters"] <= step.before["parameters"] or grown or not reads
        assert not reads or 1 < step.after["perplexity"] < 500


@pytest.mark.parametrize("path", sorted((ROOT / "specs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_spec_is_valid(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#"), "a spec begins with a sentence on what it does"
    if "steps:" in text:
        load_spec(path, registry=PassRegistry())
