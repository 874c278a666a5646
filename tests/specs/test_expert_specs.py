"""Specs for models with experts run on a small one, fully verified."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import graphopt
from graphopt.runtime import generate
from graphopt.views import Views
from tests.tiny import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
FEW = ["calibration.samples=4", "calibration.seq=32"]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with experts that reads the shipped model's tokens."""
    directory = tmp_path_factory.mktemp("routed")
    kind, values = CONFIGS["mixtral"]
    config = getattr(transformers, kind)(**{**values, "vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 0})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)
    for file in (ROOT / "examples" / "tiny_lm").glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@pytest.mark.parametrize("name", ["mc_moe", "momentum_smoe", "scmoe", "fewer_experts"])
def test_spec_runs_and_is_certified(name: str, routed: Path) -> None:
    few = [] if name == "scmoe" else FEW
    few = [*few, "steps.recover.recipe.steps=2"] if name == "momentum_smoe" else few
    (spec,) = (ROOT / "specs").rglob(f"{name}.yaml")
    program = graphopt.compile(str(routed), spec, overrides=few)
    for step in program.trail:
        assert step.certificate["level"] == "full" or step.effect == "lossless-decode"
    uses = [step.options["use"] for step in program.trail]
    if name == "mc_moe":
        assert uses == ["reroute", "quantize"]
        assert len(program.trail[0].edits) == 1
        widths = [edit["bits"] for edit in program.trail[1].edits if isinstance(edit["bits"], list)]
        assert len(widths) == 4
        assert all(sum(bits) <= 10 and {2, 3} <= set(bits) for bits in widths)
        assert program.trail[1].after["bytes"] < program.trail[1].before["bytes"]
    elif name == "momentum_smoe":
        assert len(program.trail[0].edits) == 2
    elif name == "fewer_experts":
        assert [bank.experts for bank in Views(program).experts] == [2, 2]
        assert (
            program.weights.parameters < program.trail[1].before["parameters"] < program.trail[0].before["parameters"]
        )
    else:
        # The first layer's attention lies before all choices and is shared; the second runs twice.
        assert len(Views(program).attentions) == 3
        found = generate(program, torch.tensor([[5, 6, 7]]), max_new_tokens=6)
        model = transformers.AutoModelForCausalLM.from_pretrained(routed).eval()
        with torch.no_grad():
            strong = model(found).logits[:, 2:-1]
        chosen = strong.gather(-1, found[:, 3:, None])[..., 0]
        assert bool((chosen >= strong.amax(-1) + math.log(0.1) - 1e-4).all())
