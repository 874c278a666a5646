"""What is saved loads again: as a Program, as a stock model and as a graphopt model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS
from safetensors.torch import load_file, save_file

from graphopt.artifact import load, save
from graphopt.ir.program import Applied, Program
from graphopt.ir.text import diff_text, fingerprint

IDS = torch.tensor([[5, 7, 11, 13, 17, 19], [3, 4, 9, 8, 21, 60]])
Capture = Callable[..., Program]


def logits(program: Program) -> torch.Tensor:
    return program.module(None)(input_ids=IDS)[0]


@pytest.mark.parametrize("format", ["transformers", "graphopt"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_round_trips(captured: Capture, family: str, format: str, tmp_path: Path) -> None:
    program = captured(family)
    report = save(program, tmp_path / "out", format=format)  # type: ignore[arg-type]
    again = load(tmp_path / "out")
    assert report.format == format
    assert fingerprint(again) == fingerprint(program) == report.fingerprint
    assert diff_text(program, again) == ""
    assert torch.equal(logits(again), logits(program))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if family == "gemma2" and format == "transformers":
        # transformers 5.17 leaves the soft cap out of its fast attention.
        model.set_attn_implementation("eager")
    assert torch.equal(model(input_ids=IDS).logits, logits(program))
    assert sum(p.numel() for p in model.parameters()) == program.weights.parameters


@pytest.mark.parametrize("format", ["transformers", "graphopt"])
def test_bfloat16_round_trips(captured: Capture, format: str, tmp_path: Path) -> None:
    program = captured("llama", torch.bfloat16)
    save(program, tmp_path / "out", format=format)  # type: ignore[arg-type]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=IDS).logits, logits(program))


@pytest.mark.parametrize("format", ["transformers", "graphopt"])
def test_saving_in_another_dtype(captured: Capture, format: str, tmp_path: Path) -> None:
    program = captured("qwen2", torch.bfloat16)
    save(program, tmp_path / "out", format=format, dtype=torch.float32)  # type: ignore[arg-type]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wide = program.module(torch.float32)(input_ids=IDS)[0]
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(input_ids=IDS).logits, wide, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load(tmp_path / "out")), wide, rtol=0, atol=1e-5)


def test_stock_result_needs_no_graphopt(captured: Capture, tmp_path: Path) -> None:
    program = captured("llama_tied")
    save(program, tmp_path / "out", format="transformers")
    script = f"""
import sys; sys.modules["graphopt"] = None
import torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
save_file({{"logits": model(torch.tensor({IDS.tolist()})).logits}}, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], logits(program), rtol=0, atol=1e-5)


def test_ties_are_saved_once(captured: Capture, tmp_path: Path) -> None:
    for format in ("transformers", "graphopt"):
        save(captured("llama_tied"), tmp_path / format, format=format)  # type: ignore[arg-type]
        names = load_file(tmp_path / format / "model.safetensors")
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names


def test_shards_and_companions(captured: Capture, tmp_path: Path) -> None:
    program = captured("llama")
    report = save(program, tmp_path / "out", shard_size=16 << 10)
    assert "model.safetensors.index.json" in report.files
    assert sum(name.endswith(".safetensors") for name in report.files) > 2
    assert {"tokenizer_config.json", "generation_config.json", "trail.json"} <= set(report.files)
    assert not any(name.endswith(".py") for name in report.files)
    assert torch.equal(logits(load(tmp_path / "out")), logits(program))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model(input_ids=IDS).logits, logits(program))


def test_the_trail_travels(captured: Capture, tmp_path: Path) -> None:
    step = Applied("prune", {"keep": "75%"}, "exact", ({"layer": 1},), (), {"error": 1e-7}, {"B": 2}, {"B": 1}, "x:1:2")
    for format in ("transformers", "graphopt"):
        save(replace(captured("llama"), trail=(step,)), tmp_path / format, format=format)  # type: ignore[arg-type]
        assert load(tmp_path / format).trail == (step,)


def test_a_second_save_of_a_graphopt_checkpoint_can_be_stock(captured: Capture, tmp_path: Path) -> None:
    save(captured("llama"), tmp_path / "a", format="graphopt")
    report = save(load(tmp_path / "a"), tmp_path / "b")
    assert report.format == "transformers"
    assert torch.equal(logits(load(tmp_path / "b")), logits(captured("llama")))


def test_programs_without_a_config_use_our_format(captured: Capture, tmp_path: Path) -> None:
    program = captured("llama")
    bare = replace(program, origin=replace(program.origin, config=None, path=None))
    report = save(bare, tmp_path / "out")
    assert report.format == "graphopt"
    assert "not captured from a transformers config" in report.reasons[0]


def test_generate_on_our_format(captured: Capture, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    save(captured("llama_tied"), tmp_path / "out", format="graphopt")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama_tied"))
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    ids = IDS.masked_fill(mask == 0, 0)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        found = []
        for model in (ours, stock):
            torch.manual_seed(3)
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, **options))
        assert torch.equal(*found), options


def test_our_model_trains_saves_and_casts(captured: Capture, tmp_path: Path) -> None:
    save(captured("llama_tied"), tmp_path / "a", format="graphopt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(logits(load(tmp_path / "b")), model(input_ids=IDS).logits)
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert low(input_ids=IDS).logits.dtype == torch.bfloat16
    low.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(load(tmp_path / "c")), low(input_ids=IDS).logits)


def test_our_model_refuses_what_it_cannot_do(captured: Capture, tmp_path: Path) -> None:
    save(captured("llama"), tmp_path / "out", format="graphopt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(input_ids=IDS, output_hidden_states=True)
    with pytest.raises(TypeError, match="input_ids"):
        model()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match=r"model\.norm\.weight"):
        load(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="config alone"):
        transformers.AutoModelForCausalLM.from_config(config)
