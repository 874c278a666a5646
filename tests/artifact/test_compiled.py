"""Checkpoints of ours under torch.compile: one graph, whichever backend, also without a run before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from graphopt.artifact import save
from graphopt.passkit import PassRegistry
from graphopt.testing.trial import trial
from tests.tiny import program, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["graphopt", "aot_eager", "inductor"])
def test_a_loaded_model_compiles_as_one_graph(backend: str, tmp_path: Path) -> None:
    save(program("llama"), tmp_path / "a", format="graphopt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    ids = tokens(2, 9)
    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True)(input_ids=ids).logits
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_it_does_so_cast_and_with_experts(tmp_path: Path) -> None:
    options = {"experts": 4, "router": {"kind": "random"}, "choose": {"kind": "top", "k": 2}}
    routed = trial(PassRegistry().get("refactor_moe").model_validate_json(json.dumps(options)), program("llama")).after
    save(routed, tmp_path / "a", format="graphopt")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").double()
    ids = tokens(1, 7)
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids).logits
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, model(input_ids=ids).logits)
