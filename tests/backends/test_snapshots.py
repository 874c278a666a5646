"""The kernels of what shipped specs make, as stored: a refactor of the generator shows here what it changes.

`python -m pytest tests/backends/test_snapshots.py --snapshot-update` writes the files anew; read their difference.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

import graphopt
from graphopt.backends import lower
from graphopt.backends.report import GroupReport
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.spec import LoadedSpec, load_spec, parse_spec

ROOT = Path(__file__).resolve().parents[2]
FEW = ["calibration.samples=2", "calibration.seq=24", "evaluation.samples=1", "evaluation.seq=24"]
# What a spec adds to the graph shows in the kernels. Those whose sizes hang on measured scores are left out.
SPECS = {
    "dense": None,
    "kv_svd": "methods/kv_svd.yaml",
    "decode": "serve/decode.yaml",
    "streaming": "methods/streaming.yaml",
    "h2o": "methods/h2o.yaml",
    "kivi": "methods/kivi.yaml",
    "packed": {"use": "quantize", "bits": 4, "group": 32},
}


class SourceExtension(SingleFileSnapshotExtension):
    """One readable file for each spec."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@cache
def model() -> Program:
    return graphopt.capture(ROOT / "examples" / "tiny_lm")


def spec_of(said: str | dict[str, object]) -> LoadedSpec:
    if isinstance(said, str):
        return load_spec(ROOT / "specs" / said, FEW, registry=PassRegistry())
    return parse_spec(json.dumps({"graphopt": 1, "steps": [said]}), registry=PassRegistry())


@pytest.mark.parametrize("name", SPECS)
def test_sources_are_those_stored(name: str, snapshot: SnapshotAssertion) -> None:
    """The step of one token in bfloat16: each kernel once, with how often it runs."""
    said = SPECS[name]
    program = model() if said is None else graphopt.compile(model(), spec_of(said), verify="off")
    lowered = lower(program, "cuda", dtype=torch.bfloat16, sizes={"B": 1, "S": 1}).lowered
    counts: dict[str, int] = {}
    for group in lowered.groups:
        assert isinstance(group, GroupReport)
        counts[group.kernel.source] = counts.get(group.kernel.source, 0) + 1
    calls = "".join(f"library: {count} x {op}\n" for op, count in sorted(lowered.library.items()))
    kernels = "\n".join(f"# runs {count} x\n{source}" for source, count in counts.items())
    assert f"{calls}\n{kernels}" == snapshot(extension_class=SourceExtension)
