"""docs/testing.md says what is so: its examples run or are run elsewhere, its tables list every law and every planted bug."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from graphopt.testing import LAWS
from graphopt.testing.planted import BUGS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCKS = [code for _, code in re.findall(r"^(`{3,})python\n(.*?)^\1$", PAGE, re.DOTALL | re.MULTILINE)]


def test_the_complete_example_is_the_package_that_is_tested() -> None:
    package = ROOT / "tests" / "third_party"
    code = (package / "graphopt_skip_odd" / "__init__.py").read_text()
    shown = next(block for block in BLOCKS if "class SkipOdd" in block)
    assert shown.strip() in code
    assert 'skip_odd = "graphopt_skip_odd:SkipOdd"' in (package / "pyproject.toml").read_text()
    line = next(block for block in BLOCKS if block.startswith("from graphopt.testing import laws_of"))
    assert line.splitlines()[-1] in (package / "test_skip_odd.py").read_text()
    assert f"skip_odd: {len(LAWS)} of {len(LAWS)} laws" in PAGE


def test_the_kernel_example_runs() -> None:
    names: dict[str, Any] = {}
    exec(next(block for block in BLOCKS if "def fused" in block), names)
    names["test_fused_norm"]()


def test_the_table_of_laws_is_complete() -> None:
    listed = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", PAGE, re.MULTILINE)
    assert [name for name in listed if name in LAWS] == list(LAWS)


def test_the_table_of_planted_bugs_is_complete() -> None:
    rows = re.findall(r"^\| ([^|`]+) \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert rows == [(bug.name, bug.law) for bug in BUGS]


def test_the_mutation_score_is_the_measured_one() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "mutation.json").read_text())
    assert measured["score"] >= 0.85
    said = f"{measured['killed'] + measured['timeout']} of {measured['ran']} mutants"
    assert said in " ".join(PAGE.split())
    for survivor in measured["survivors"]:
        assert f"{survivor['file']}:{survivor['line']}" in PAGE


@pytest.mark.parametrize("name", re.findall(r"`python -m (graphopt[\w.]+)`", PAGE))
def test_commands_exist(name: str) -> None:
    assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
