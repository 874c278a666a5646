"""A pass from a package of its own: found through its entry point, and held to all laws by one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from graphopt.passkit import PassRegistry, registry
from graphopt.spec import parse_spec

PACKAGE = Path(__file__).resolve().parents[1] / "third_party"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package on the path, with the entry points that its pyproject declares."""
    declared = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    points = [EntryPoint(name, value, group) for group, found in declared.items() for name, value in found.items()]
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])
    registry._third_party.cache_clear()
    yield
    registry._third_party.cache_clear()


@pytest.mark.usefixtures("installed")
def test_a_spec_may_use_it() -> None:
    passes = PassRegistry()
    assert "skip_odd" in passes.names()
    loaded = parse_spec("graphopt: 1\nsteps:\n  - use: skip_odd\n    first: 3\n", registry=passes)
    assert loaded.steps[0].config.to_yaml() == {"use": "skip_odd", "first": 3}  # type: ignore[attr-defined]


def test_one_line_runs_every_law_and_the_plugin_counts_examples() -> None:
    from graphopt.testing import LAWS

    paths = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "graphopt.testing.plugin"]
    done = subprocess.run(
        [*command, "--laws-examples=3", "test_skip_odd.py"],
        cwd=PACKAGE,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = re.search(r"skip_odd: (\d+) of (\d+) laws on (\d+) examples, (\d+) with edits", done.stdout)
    assert summary is not None, done.stdout
    held, laws, examples, edited = map(int, summary.groups())
    assert held == laws == len(LAWS)
    assert examples == 3
    assert edited >= 1
    assert summary[0] in (PACKAGE.parents[1] / "docs" / "testing.md").read_text(encoding="utf-8")


def test_it_uses_public_names_only() -> None:
    text = (PACKAGE / "graphopt_skip_odd" / "__init__.py").read_text() + (PACKAGE / "test_skip_odd.py").read_text()
    used = set(re.findall(r"^from (graphopt[\w.]*) import", text, re.MULTILINE))
    assert used == {"graphopt", "graphopt.passkit", "graphopt.testing", "graphopt_skip_odd"}
