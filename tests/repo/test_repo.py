"""The repository's own rules: small files, light imports, fresh pages, the public surface."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import graphopt

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for folder in ("graphopt", "passes", "backends") for p in (ROOT / folder).rglob("*.py"))


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long
    assert not [p for p in SOURCES if p.name in ("utils.py", "helpers.py", "common.py")]


def test_public_names() -> None:
    assert graphopt.__all__ == ["Pass", "Program", "capture", "compile", "load", "load_spec", "save"]
    for name in graphopt.__all__:
        assert getattr(graphopt, name) is not None


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, graphopt, graphopt.cli\n"
        "heavy = {'torch', 'transformers', 'sympy', 'scipy', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bare_import_of_passes_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "import graphopt.passes" in done.stderr


def test_pass_pages_are_fresh() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_pages import PAGES, pages
    finally:
        sys.path.pop(0)
    stale = [
        name for name, text in pages().items() if not (PAGES / name).is_file() or (PAGES / name).read_text() != text
    ]
    assert not stale, "run `make docs`"


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "docs" / "passes").glob("[!R]*.md")))
def test_every_pass_has_a_spec(name: str) -> None:
    used = [p for p in (ROOT / "specs").rglob("*.yaml") if f"use: {name}\n" in p.read_text()]
    assert used or name == "cleanup"
