"""Fuzzing end to end: a planted bug is found, saved once, and shrunk to the smallest case that still shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.diagnostics import SpecError
from graphopt.testing.cases import Case, shrink
from graphopt.testing.fuzz import Session, fuzz
from graphopt.testing.models import Shape
from graphopt.testing.planted import norm_without_eps
from graphopt.testing.strategies import Pipeline

LARGE = Shape(layers=2, heads=2, kv_heads=2, head_dim=2, hidden=6, neurons=5, biases=True)
STEPS = (
    {"use": "prune_neurons", "keep": "60%"},
    {"use": "prune_hidden", "keep": "50%", "score": {"kind": "order"}},
    {"use": "cleanup"},
)


def reproducer(directory: Path) -> Path:
    """A saved failure of the planted bug."""
    with norm_without_eps():
        case = Case(LARGE, STEPS)
        failure = case.run(("surgery_equals_emulation",))
        assert failure is not None
        assert failure.step == 1
        return case.save(directory, failure)


def test_shrinking_ends_at_one_step_on_the_smallest_model(tmp_path: Path) -> None:
    case, law = Case.load(reproducer(tmp_path))
    with norm_without_eps():
        small, failure = shrink(case, law)
    assert failure.law == "surgery_equals_emulation"
    assert [dict(step) for step in small.steps] == [{"use": "prune_hidden", "keep": "50%"}]
    assert small.shape.layers == 1
    assert small.shape.heads == 1
    assert small.shape.hidden <= 4
    assert not small.shape.biases


def test_command_prints_and_writes_the_smallest_case(tmp_path: Path) -> None:
    file = reproducer(tmp_path)
    with norm_without_eps():
        done = CliRunner().invoke(app, ["shrink", str(file), "--out", str(tmp_path / "small.json")])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "small.json").read_text())
    assert data["law"] == "surgery_equals_emulation"
    assert len(data["steps"]) == 1
    assert "prune_hidden" in done.stdout


def test_command_says_when_nothing_fails_any_more(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["shrink", str(reproducer(tmp_path))])
    assert done.exit_code == 1
    assert "does not break" in done.stderr


@pytest.mark.parametrize("text", ["{}", "[", '{"reproducer": 1, "law": "no_law", "shape": {}, "seed": 0, "steps": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text)
    with pytest.raises(SpecError, match="is no reproducer"):
        Case.load(file)


def test_one_bug_is_saved_once(tmp_path: Path) -> None:
    session = Session(tmp_path)
    configs = Case(LARGE, STEPS[1:2]).configs()
    with norm_without_eps():
        session.take(Pipeline(LARGE, configs))
        session.take(Pipeline(LARGE, configs))
    assert session.cases == 2
    assert len(session.found) == len(list(tmp_path.iterdir())) == 1


def test_clean_passes_leave_nothing(tmp_path: Path) -> None:
    assert Case(LARGE, STEPS).run(("plan_is_pure", "surgery_equals_emulation", "nothing_left_behind")) is None


@pytest.mark.fuzz
def test_fuzzing_finds_nothing(tmp_path: Path) -> None:
    session = fuzz(0.5, tmp_path, start=1000)
    assert session.cases > 0
    assert not session.found, str(session)
