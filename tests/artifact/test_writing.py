"""Saving is atomic and refuses what it should: full disks, interrupts, bad weights, bad paths, damaged files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphopt.artifact import load, save
from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.weights import MemorySource, WeightStore

Capture = Callable[..., Program]


@pytest.fixture
def program(captured: Capture) -> Program:
    return captured("llama")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def with_value(program: Program, name: str, value: float) -> Program:
    tensors = {n: program.weights.evaluate(n).clone() for n in program.weights}
    tensors[name].view(-1)[:3] = value
    return replace(program, weights=WeightStore(program.weights.weights, MemorySource(tensors)))


class Failing:
    """A source of tensors that fails at the fifth."""

    def __init__(self, program: Program, error: BaseException) -> None:
        self.store, self.error, self.count = program.weights, error, 0

    def get(self, name: str) -> torch.Tensor:
        self.count += 1
        if self.count == 5:
            raise self.error
        return self.store.evaluate(name)


@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), ArtifactError, "disk_full"),
        (OSError(errno.EACCES, "Permission denied"), ArtifactError, "cannot_write"),
        (RuntimeError("boom"), RuntimeError, None),
    ],
)
def test_a_failure_in_the_middle_keeps_the_old_artifact(
    program: Program, tmp_path: Path, error: BaseException, raised: type[BaseException], code: str | None
) -> None:
    save(program, tmp_path / "out", format="graphopt")
    before = contents(tmp_path / "out")
    broken = replace(program, weights=WeightStore(program.weights.weights, Failing(program, error)))
    with pytest.raises(raised) as caught:
        save(broken, tmp_path / "out", format="graphopt", overwrite=True)
    if code is not None:
        assert getattr(caught.value, "code") == code  # noqa: B009
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing_call", [0, 1])
def test_an_interrupt_between_the_renames_keeps_the_old_artifact(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    save(program, tmp_path / "out", format="graphopt")
    before = contents(tmp_path / "out")
    real, calls = os.rename, []

    def rename(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing_call + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save(program, tmp_path / "out", format="graphopt", overwrite=True)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_known_to_be_too_small_says_how_much_is_needed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ArtifactError, match=r"needs \d{6,} bytes") as caught:
        save(program, tmp_path / "out", format="graphopt")
    assert caught.value.code == "disk_full"
    assert "1000 bytes are free" in caught.value.notes[0]
    assert not any(tmp_path.iterdir())


def test_overwriting(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save(program, out, format="graphopt")
    with pytest.raises(ArtifactError, match="not empty") as caught:
        save(program, out, format="graphopt")
    assert caught.value.code == "exists"
    save(program, out, format="graphopt", dtype=torch.bfloat16, overwrite=True)
    assert load(out).dtype == torch.bfloat16
    (out / "trail.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        save(program, out, format="graphopt", overwrite=True)
    assert caught.value.code == "not_ours"


def test_bad_targets(program: Program, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = checkpoint("llama")
    (tmp_path / "link").symlink_to(source)
    for target, code in (
        (tmp_path / "a" / ".." / "b", "path_outside"),
        (tmp_path / "file", "not_a_directory"),
        (tmp_path / "file" / "below", "cannot_write"),
        (source, "overwrites_source"),
        (source.parent, "overwrites_source"),
        (tmp_path / "link", "overwrites_source"),
    ):
        with pytest.raises(ArtifactError) as caught:
            save(program, target, format="graphopt", overwrite=True)
        assert caught.value.code == code, target
    with pytest.raises(ArtifactError, match="unknown format"):
        save(program, tmp_path / "x", format="onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_counted(program: Program, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for format in ("graphopt", "transformers"):
        with pytest.raises(ArtifactError, match=rf"'{name}' holds 3 NaN or infinite values of 1536") as caught:
            save(with_value(program, name, value), tmp_path / "out", format=format)  # type: ignore[arg-type]
        assert caught.value.code == "not_finite"
    assert not any(tmp_path.iterdir())


def test_overflow_in_a_narrower_dtype_is_found(program: Program, tmp_path: Path) -> None:
    large = with_value(program, "model.norm.weight", 1e30)
    with pytest.raises(ArtifactError, match=r"infinite in torch\.float16"):
        save(large, tmp_path / "out", format="graphopt", dtype=torch.float16)


@pytest.mark.parametrize("format", ["graphopt", "transformers"])
@pytest.mark.parametrize("length", [4, 100, -7])
def test_truncated_weights_are_refused(program: Program, tmp_path: Path, format: str, length: int) -> None:
    save(program, tmp_path / "out", format=format)  # type: ignore[arg-type]
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "out")
    assert caught.value.code == "unreadable_weights"


def test_an_index_that_leaves_the_directory_is_refused(program: Program, tmp_path: Path) -> None:
    save(program, tmp_path / "out", format="graphopt", shard_size=16 << 10)
    index = tmp_path / "out" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="outside the checkpoint"):
        load(tmp_path / "out")


def test_damaged_companions_are_refused(program: Program, tmp_path: Path) -> None:
    for file, text, code in (
        ("config.json", "{", "bad_config"),
        ("config.json", "[]", "bad_config"),
        ("trail.json", '{"graphopt_trail": 1, "steps": [{"evil": 1}]}', "bad_trail"),
        ("trail.json", "[" * 100_000, "bad_trail"),
        ("constants.safetensors", "xx", "unreadable_graph"),
        ("graph.txt", "", "bad_graph"),
    ):
        save(program, tmp_path / "out", format="graphopt", overwrite=True)
        (tmp_path / "out" / file).write_text(text)
        with pytest.raises(ArtifactError) as caught:
            load(tmp_path / "out")
        assert caught.value.code == code, file
        shutil.rmtree(tmp_path / "out")


def test_tensors_that_disagree_with_the_graph_are_refused(program: Program, tmp_path: Path) -> None:
    save(program, tmp_path / "out", format="graphopt")
    graph = tmp_path / "out" / "graph.txt"
    head = "@lm_head.weight parameter f32[{}, 32]"
    graph.write_text(graph.read_text().replace(head.format(64), head.format(99)))
    with pytest.raises(ArtifactError, match="on disk") as caught:
        load(tmp_path / "out")
    assert caught.value.code == "wrong_shape"
