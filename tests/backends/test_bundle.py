"""Bundles: a second process has everything that it runs, and refuses what was not made for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphopt.backends import lower
from graphopt.backends.bundle import load_bundle
from graphopt.backends.bundler import save_bundle
from graphopt.diagnostics import PlanError
from tests.backends.test_replay import cached
from tests.tiny import make_model, program, tokens

SIZES = {"B": 1, "S": 1, "C": 32}
SECOND = """
import sys
from pathlib import Path
import triton
from triton.compiler import ASTSource
from graphopt.backends import lowering, programs
from graphopt.backends.bundle import load_bundle
from graphopt.backends.bundler import compile_all
from tests.backends.test_replay import cached

def never(*_, **__):
    raise AssertionError("something is made anew")

source = cached()
programs.traced = programs.lower_graph = lowering.build = never
ASTSource.make_ir = never
made = load_bundle(Path(sys.argv[1]), source)
compile_all(made, "sm_90", {"B": 1, "S": 1, "C": 32}, Path(triton.knobs.cache.dir))
print("launches", len([n for n in made.lowered.graph.graph.nodes if "kernel" in n.meta]))
try:
    compile_all(made, "sm_80", {"B": 1, "S": 1, "C": 32}, Path(triton.knobs.cache.dir))
except AssertionError:
    print("another target is compiled")
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    made = lower(cached(), "cuda", dtype=torch.bfloat16, sizes={"B": 1, "S": 1})
    save_bundle(made, tmp_path / "bundle", "sm_90", SIZES)
    elsewhere = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "GRAPHOPT_CACHE": str(tmp_path / "own")}
    done = subprocess.run(
        [sys.executable, "-c", SECOND, str(tmp_path / "bundle")],
        env={**os.environ, **elsewhere, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    launches = len([node for node in made.lowered.graph.graph.nodes if "kernel" in node.meta])  # type: ignore[union-attr]
    assert done.stdout.split("\n")[:2] == [f"launches {launches}", "another target is compiled"]

    bundle = tmp_path / "bundle"
    with pytest.raises(PlanError, match="another program"):
        load_bundle(bundle, program("llama"))
    with pytest.raises(PlanError, match="exists"):
        save_bundle(made, bundle, "sm_90", SIZES)
    kernel = next((bundle / "kernels").glob("*.py"))
    kernel.write_text(kernel.read_text() + "\nimport os\n")
    with pytest.raises(PlanError, match="was changed"):
        load_bundle(bundle, cached())
    said = json.loads((bundle / "bundle.json").read_text())
    call = next(each for each in said["nodes"] if "target" in each)
    call["target"] = "aten.os.system"
    (bundle / "bundle.json").write_text(json.dumps(said))
    with pytest.raises(PlanError, match="no op"):
        load_bundle(bundle, cached())


def test_a_loaded_bundle_has_the_graph_and_the_sources_that_were_lowered(tmp_path: Path) -> None:
    """The graph of a bundle is the graph that was lowered, library calls included."""
    made = lower(cached(), "cuda", dtype=torch.float32, sizes={"B": 1, "S": 1})
    save_bundle(made, tmp_path / "bundle", "sm_80", SIZES)
    again = load_bundle(tmp_path / "bundle", cached())
    first, second = made.lowered.graph, again.lowered.graph
    assert first is not None
    assert second is not None
    assert [n.op for n in first.graph.nodes] == [n.op for n in second.graph.nodes]
    for mine, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        assert [a.op for a in mine.all_input_nodes] == [a.op for a in other.all_input_nodes]
        assert mine.meta.get("kernel", mine).__class__ is other.meta.get("kernel", other).__class__
        if "kernel" in mine.meta:
            assert mine.meta["kernel"].source == other.meta["kernel"].source
        elif mine.op == "call_function":
            assert mine.target == other.target


ALONE = """
import sys
from pathlib import Path
import torch
from graphopt.backends.bundle import load_bundle

given, wanted = torch.load(sys.argv[2])
(got,) = load_bundle(Path(sys.argv[1]))(input_ids=given)
print([name for name in ("torch._dynamo", "transformers", "sympy", "triton") if name in sys.modules])
torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_bundle_with_weights_needs_neither_a_model_nor_a_compiler(name: str, tmp_path: Path) -> None:
    """A second process computes what the model does, and imports nothing that captures or compiles."""
    save_bundle(lower(program(name), "cpu"), tmp_path / "bundle", "cpu", {}, weights=True)
    ids = tokens(2, 7)
    with torch.no_grad():
        torch.save((ids, make_model(name)(ids).logits), tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "bundle"), str(tmp_path / "case.pt")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "[]\n"


def test_what_is_bundled_for_another_device_is_refused(tmp_path: Path) -> None:
    source = program("llama")
    with pytest.raises(PlanError, match="eager library calls on cpu"):
        save_bundle(lower(source, "cpu"), tmp_path / "bundle", "sm_90", {"B": 1, "S": 1})
    with pytest.raises(PlanError, match="interpreted"):
        save_bundle(lower(source, "cpu", interpret=True), tmp_path / "bundle", "cpu", {})
    save_bundle(lower(source, "cpu"), tmp_path / "bundle", "cpu", {})
    with pytest.raises(PlanError, match="no weights"):
        load_bundle(tmp_path / "bundle")
    ids = tokens(1, 5)
    torch.testing.assert_close(load_bundle(tmp_path / "bundle", source)(input_ids=ids), source.module()(input_ids=ids))
