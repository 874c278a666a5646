"""Specs about tokens run on the shipped model that looks at pictures, fully verified, at the cost that they say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graphopt
from graphopt.cost import cost
from graphopt.ir.program import Program
from graphopt.runtime import Decoder, generate, with_cache

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "examples" / "tiny_vlm" / "questions.safetensors"
PICTURE = 64
# Spec, and how many of a picture's 64 tokens the caches of the decoder's six layers hold behind the prompt.
SPECS = {
    "pyramiddrop": [64, 64, 32, 16, 16, 8],
    "mustdrop": [16, 16, 16, 16, 16, 16],
    "dynamic_llava": [64, 64, 16, 16, 16, 16],
}


@cache
def whole() -> Program:
    """The model as it is shipped."""
    return graphopt.capture(ROOT / "examples" / "tiny_vlm")


@pytest.mark.parametrize("name", SPECS)
def test_spec_runs_and_is_certified(name: str) -> None:
    short = [f"steps.{step}.recipe.steps=2" for step in ("drop_tokens", "answer")] if name == "dynamic_llava" else []
    program = graphopt.compile(None, ROOT / "specs" / "methods" / f"{name}.yaml", overrides=short)
    assert all(step.certificate["level"] == "full" for step in program.trail)
    text = 20
    found, before = (cost(each).at(B=1, S=PICTURE + text, I=1) for each in (program, whole()))
    entry = found["kv_bytes_per_token"] // 6
    assert found["kv_bytes"] == sum(left + text for left in SPECS[name]) * entry
    # Choosing costs as well: long texts that all ask would cost more than few tokens less save.
    assert found["flops"] < before["flops"]


@pytest.mark.parametrize("name", ["pyramiddrop", "mustdrop"])
def test_answers_are_the_same_with_a_cache(name: str) -> None:
    program = graphopt.compile(None, ROOT / "specs" / "methods" / f"{name}.yaml", verify="off")
    made, why = with_cache(program)
    assert why is None
    rows = load_file(QUESTIONS)
    asked = (rows["answers"][0] == 0) & (rows["attention_mask"][0] == 1)
    given = {"max_new_tokens": 5, "pixel_values": rows["pixel_values"][:1].double()}
    ids = rows["input_ids"][:1, : int(asked.sum())]
    plain = generate(program.module(torch.float64), ids, **given)
    assert torch.equal(generate(Decoder(made, torch.float64), ids, **given), plain)


def test_questions_fit_the_model() -> None:
    rows = load_file(QUESTIONS)
    assert {name: len(tensor) for name, tensor in rows.items()} == dict.fromkeys(rows, 192)
    assert ((rows["input_ids"] == 3).sum(1) == PICTURE).all()
    assert bool(rows["answers"].any(1).all())
    assert not bool((rows["answers"] & (rows["attention_mask"] == 0)).any())
