"""Checkpoints as they come: 8-bit floats, mixed types, tensors too many, too few or of the wrong shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphopt.artifact import load, save
from graphopt.diagnostics import ArtifactError
from graphopt.frontend.checkpoint import CheckpointSource

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EXTRA = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def changed(checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that copies a random checkpoint and changes its tensors: a value replaces one, None removes it."""

    def make(
        changes: dict[str, torch.Tensor | None], family: str = "llama", dtype: torch.dtype = torch.float32
    ) -> Path:
        directory = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoint(family, dtype), directory)
        tensors = load_file(directory / "model.safetensors")
        tensors = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make


def test_extra_tensors_are_listed_and_carried_over(changed: Callable[..., Path], tmp_path: Path) -> None:
    extra = torch.arange(4, dtype=torch.float16)
    program = load(changed({EXTRA: extra, "meta.counts": torch.tensor([3, 4])}))
    assert set(program.weights.extra) == {EXTRA, "meta.counts"}
    report = save(program, tmp_path / "with")
    assert set(report.extra) == set(program.weights.extra)
    held = load_file(tmp_path / "with" / "model.safetensors")
    assert torch.equal(held[EXTRA], extra)
    assert held["meta.counts"].tolist() == [3, 4]
    assert save(program, tmp_path / "without", extra=False).extra == ()
    assert set(load_file(tmp_path / "without" / "model.safetensors")) == set(held) - set(report.extra)
    assert load(tmp_path / "with").weights.extra == program.weights.extra


def test_a_tied_tensor_stored_twice_is_one_weight(changed: Callable[..., Path], tmp_path: Path) -> None:
    base = changed({}, "llama_tied")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    program = load(changed({"lm_head.weight": table.clone()}, "llama_tied"))
    assert program.weights.extra == ()
    save(program, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert len(names & {"lm_head.weight", "model.embed_tokens.weight"}) == 1


def test_mixed_dtypes_follow_the_config(changed: Callable[..., Path], checkpoint: Callable[..., Path]) -> None:
    """As transformers does, what is stored wider than the config says is rounded to it, and what is narrower widens."""
    plain = load_file(checkpoint("llama", torch.bfloat16) / "model.safetensors")
    wide = plain[NORM].float() + 2**-12
    program = load(changed({NORM: wide, UP: plain[UP].to(torch.float16)}, "llama", torch.bfloat16))
    assert torch.equal(program.weights.evaluate(NORM), wide.to(torch.bfloat16))
    assert torch.equal(program.weights.evaluate(UP), plain[UP].to(torch.float16).to(torch.bfloat16))
    assert {weight.expr.dtype for weight in program.weights.weights.values() if weight.kind != "constant"} == {
        torch.bfloat16
    }


def scaled(value: torch.Tensor, scale: torch.Tensor, spread: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit values of a tensor under a scale, and what they stand for."""
    stored = (value / spread).to(torch.float8_e4m3fn)
    return stored, stored.float() * spread


@pytest.mark.parametrize("kind", ["none", "one", "rows", "grid"])
def test_eight_bit_floats(kind: str, tmp_path: Path) -> None:
    value = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    scale = {
        "none": torch.ones(()),
        "one": torch.tensor(0.03),
        "rows": torch.rand(200, 1) + 0.1,
        "grid": torch.rand(2, 3) + 0.1,
    }[kind]
    spread = scale
    if kind == "grid":
        spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    stored, meant = scaled(value, scale, spread)
    tensors = {"w.weight": stored} | ({} if kind == "none" else {"w.weight_scale_inv": scale})
    save_file(tensors, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    assert source.names == ("w.weight",)
    assert source.dtype("w.weight") == (torch.float8_e4m3fn if kind == "none" else torch.float32)
    assert torch.equal(source.get("w.weight").float(), meant)
    assert torch.equal(source.rows("w.weight", 127, 131).float(), meant[127:131])


def test_an_eight_bit_checkpoint_becomes_a_plain_one(changed: Callable[..., Path], tmp_path: Path) -> None:
    base = changed({}, "llama", torch.bfloat16)
    value = load_file(base / "model.safetensors")[UP].float()
    spread = value.abs().amax() / 100
    stored, meant = scaled(value, spread, spread)
    directory = changed({UP: stored, f"{UP}_scale": spread.reshape(1)}, "llama", torch.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config))
    save(load(directory), tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(held[UP], meant.to(torch.bfloat16))
    assert f"{UP}_scale" not in held
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(8, 8).to(torch.float8_e4m3fn), "w_scale": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="scaled by 'w_scale'") as caught:
        CheckpointSource(tmp_path)
    assert caught.value.code == "scale_not_understood"


def test_missing_and_misshapen_tensors_are_named(changed: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match=f"lacks 1 tensors .* '{UP}'") as caught:
        load(changed({UP: None, UP.replace("weight", "qweight"): torch.zeros(3)}))
    assert caught.value.code == "missing_tensors"
    assert "unpack" in caught.value.diagnostics[0].help[0]
    with pytest.raises(ArtifactError, match=rf"'{UP}' is \[5, 32\] on disk, but config.json makes it \[48, 32\]"):
        load(changed({UP: torch.zeros(5, 32)}))


def sharded(directory: Path) -> Path:
    """Two tensors in two files with an index."""
    save_file({"a": torch.ones(2)}, directory / "one.safetensors")
    save_file({"b": torch.ones(3)}, directory / "two.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    return index


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        ({"a": "one.safetensors", "b": "three.safetensors"}, "missing_shards"),
        ({"a": "two.safetensors"}, "missing_tensors"),
        ({"a": "/etc/passwd"}, "path_outside"),
        ({"a": 3}, "path_outside"),
        ("a", "bad_index"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, code: str) -> None:
    index = sharded(tmp_path)
    assert set(CheckpointSource(tmp_path).names) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError) as caught:
        CheckpointSource(tmp_path)
    assert caught.value.code == code


def header(entries: object, data: int) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return len(text).to_bytes(8, "little") + text + bytes(data)


def tensor(start: int, stop: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"{", 0),
        header([], 0),
        header({"a": 3}, 0),
        header({"a": tensor(0, 8)}, 7),
        header({"a": tensor(0, 8)}, 9),
        header({"a": tensor(4, 12)}, 12),
        header({"a": tensor(0, 8), "b": tensor(4, 12)}, 12),
        header({"a": tensor(0, 8, (3,))}, 8),
        header({"a": tensor(0, 8, (-2,))}, 8),
        header({"a": tensor(8, 0)}, 8),
        header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', 8),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        CheckpointSource(tmp_path)
    assert caught.value.code == "unreadable_weights"


def test_a_dtype_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(header({"a": tensor(0, 8, (16,), "F4")}, 8))
    source = CheckpointSource(tmp_path)
    with pytest.raises(ArtifactError, match=r"'a' .* stored as F4") as caught:
        source.get("a")
    assert caught.value.code == "dtype_not_read"
