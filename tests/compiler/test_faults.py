"""Planted faults: each is caught, with its code, its place and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphopt
from graphopt.diagnostics import ArtifactError, GraphoptError
from graphopt.passkit import PassRegistry
from graphopt.spec import load_spec


def write(directory: Path, checkpoint: Path, body: str) -> Path:
    """A spec on the tiny checkpoint with calibration and evaluation text."""
    data = os.path.relpath(checkpoint / "heldout.txt", directory)
    file = directory / "fault.yaml"
    file.write_text(
        f"graphopt: 1\nmodel: {checkpoint}\n"
        f"calibration: {{data: {data}, samples: 4, seq: 16}}\n"
        f"evaluation: {{data: {data}, samples: 4, seq: 16}}\n{body}"
    )
    return file


MODEL_FAULTS = {
    "head count that does not divide": (
        "steps:\n  - use: regroup_kv\n    kv_heads: 3\n",
        ("fault.yaml:6:", "cannot make 3", "1, 2, 4"),
    ),
    "selector that matches no layer": (
        "steps:\n  - use: prune_neurons\n    keep: 50%\n    where: {layers: 7}\n",
        ("fault.yaml:8:", "there is no layer 7", "0..1"),
    ),
    "selector that matches no path": (
        "steps:\n  - use: prune_neurons\n    keep: 50%\n    where: {paths: [model.layer.*]}\n",
        ("fault.yaml:8:", "matches nothing"),
    ),
    "budget that cannot be met": (
        "steps:\n  - use: prune_heads\n    unit: kv_group\n    keep: 60%\n",
        ("fault.yaml:6:", "50%", "75%"),
    ),
    "unknown dimension": (
        "steps:\n  - use: regroup_kv\n    kv_heads: hedas / 2\n",
        ("fault.yaml:", "hedas", "heads"),
    ),
    "nothing to do": (
        "steps:\n  - use: prune_neurons\n    keep: 100%\n",
        ("fault.yaml:6:", "found nothing to change", "optional: true"),
    ),
    "check that is missed": (
        "steps:\n  - use: prune_neurons\n    keep: 50%\nchecks: {parameters: at most 10%}\n",
        ("fault.yaml:8:", "parameters is", "at most"),
    ),
}


@pytest.mark.parametrize("fault", sorted(MODEL_FAULTS))
def test_fault_of_a_step_is_caught_with_its_place(fault: str, tmp_path: Path, checkpoint: Path) -> None:
    body, expected = MODEL_FAULTS[fault]
    out = tmp_path / "out"
    with pytest.raises(GraphoptError) as caught:
        graphopt.compile(None, write(tmp_path, checkpoint, body), out=out)
    for words in expected:
        assert words in str(caught.value), str(caught.value)
    assert not out.exists()


SPEC_FAULTS = {
    "unknown field": ("steps:\n  - use: prune_neurons\n    keep: 50%\n    scoer: taylor\n", "unknown_field", "score"),
    "misspelt pass": ("steps:\n  - use: prune_neuron\n    keep: 50%\n", "unknown_pass", "prune_neurons"),
    "repeated key": ("steps:\n  - use: prune_neurons\n    keep: 50%\n    keep: 60%\n", "repeated_key", "keep"),
    "alias bomb": ("name: &a x\ndescription: *a\nsteps: []\n", "yaml_", "fault.yaml:5"),
    "merge key": ("checks:\n  <<: {parameters: at most 5%}\nsteps: []\n", "yaml_", "<<"),
    "depth": ("name: " + "[" * 60 + "]" * 60 + "\n", "yaml_", "fault.yaml:5"),
    "tower of powers": ("steps:\n  - use: regroup_kv\n    kv_heads: 9**9**9\n", "bad_expression", "fault.yaml:7:"),
    "python": ("steps:\n  - use: regroup_kv\n    kv_heads: __import__('os')\n", "bad_expression", "fault.yaml:7:"),
}


@pytest.mark.parametrize("fault", sorted(SPEC_FAULTS))
def test_fault_of_a_spec_is_caught_before_a_model_loads(fault: str, tmp_path: Path, checkpoint: Path) -> None:
    body, code, words = SPEC_FAULTS[fault]
    with pytest.raises(GraphoptError) as caught:
        load_spec(write(tmp_path, checkpoint, body), registry=PassRegistry())
    assert any(d.code.startswith(code) for d in caught.value.diagnostics), [d.code for d in caught.value.diagnostics]
    assert words in str(caught.value)


def damaged(tmp_path: Path, checkpoint: Path) -> Path:
    """A copy of the checkpoint to damage."""
    copy = tmp_path / "damaged"
    shutil.copytree(checkpoint, copy)
    return copy


STEP = "steps:\n  - use: prune_neurons\n    keep: 50%\n"


def test_truncated_weights_are_named(tmp_path: Path, checkpoint: Path) -> None:
    copy = damaged(tmp_path, checkpoint)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file") as caught:
        graphopt.compile(copy, write(tmp_path, checkpoint, STEP))
    assert caught.value.code == "unreadable_weights"


def test_nan_weight_is_named(tmp_path: Path, checkpoint: Path) -> None:
    copy = damaged(tmp_path, checkpoint)
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraphoptError, match=name) as caught:
        graphopt.compile(copy, write(tmp_path, checkpoint, STEP))
    assert caught.value.code == "not_finite"


def test_missing_tensor_is_named(tmp_path: Path, checkpoint: Path) -> None:
    copy = damaged(tmp_path, checkpoint)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        graphopt.compile(copy, write(tmp_path, checkpoint, STEP))


def test_output_outside_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(GraphoptError, match=r"\.\."):
        graphopt.compile(None, write(tmp_path, checkpoint, STEP), out=f"{tmp_path}/a/../../b")


def test_the_model_is_never_overwritten(tmp_path: Path, checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(GraphoptError):
        graphopt.compile(None, write(tmp_path, checkpoint, STEP), out=checkpoint, overwrite=True)
    assert (checkpoint / "model.safetensors").read_bytes() == before
