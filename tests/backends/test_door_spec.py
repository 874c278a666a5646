"""Specs through `torch.compile(model, backend="graphopt", options={"spec": ...})`: the same models as `graphopt run` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import graphopt
from tests.tiny import make_model, tokens

PRUNED = """graphopt: 1
steps:
  - use: prune_units
    units: [kv_group, neuron]
    keep: 50%
    score: magnitude
"""


class Plain(nn.Module):
    """A module of no library, with one break where `broken`."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.layer, self.broken = nn.Linear(4, 4), broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        if self.broken:
            torch._dynamo.graph_break()
        return hidden + 1


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "pruned.yaml"
    path.write_text(PRUNED)
    return path


def door(model: Any, spec: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    report: list[dict[str, Any]] = []
    return torch.compile(model, backend="graphopt", options={"spec": spec, "report": report, **options}), report


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_model_that_a_run_of_the_spec_saves(name: str, spec: Path, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path / "before")
    graphopt.compile(tmp_path / "before", spec, out=tmp_path / "after")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    run, report = door(model, spec)
    with torch.no_grad():
        for batch, length in ((2, 9), (1, 1)):
            ids = tokens(batch, length)
            torch.testing.assert_close(run(ids, use_cache=False).logits, saved(ids).logits, rtol=1e-4, atol=1e-4)
    assert report[0]["steps"] == ["prune_units"]
    assert len(report[0]["frozen"]) > 3


def test_kernels_of_the_transformed_model(spec: Path) -> None:
    model = make_model("llama")
    run, report = door(model, spec, interpret=True)
    ids = tokens(2, 6)
    wanted = graphopt.compile(model, spec).module()(input_ids=ids)[0]
    with torch.no_grad():
        torch.testing.assert_close(run(ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(report[0]["groups"]) > 5


def test_padding_is_an_argument(spec: Path) -> None:
    model = make_model("llama")
    run, _ = door(model, spec)
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    wanted = graphopt.compile(model, spec).module()(input_ids=ids, attention_mask=mask)[0]
    with torch.no_grad():
        mine = run(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(mine[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)


def test_weights_that_no_step_changes_stay_the_models(spec: Path) -> None:
    model = make_model("llama")
    run, report = door(model, spec)
    ids = tokens(2, 6)
    with torch.no_grad():
        before = run(ids, use_cache=False).logits
        assert not any("lm_head" in name or "embed" in name for name in report[0]["frozen"])
        model.lm_head.weight.mul_(2)
        torch.testing.assert_close(run(ids, use_cache=False).logits, 2 * before)


def refused(spec: Path, model: nn.Module, match: str, *arguments: Any, **keywords: Any) -> None:
    run, _ = door(model, spec)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=match):
        run(*arguments, **keywords)


def test_what_cannot_be_transformed_is_said(spec: Path) -> None:
    model, ids = make_model("llama"), tokens(2, 6)
    refused(spec, model, r"returns a tensor .* none of logits", ids, use_cache=True)
    refused(spec, model, "spec_on_other_inputs", inputs_embeds=torch.randn(2, 6, 32), use_cache=False)
    refused(spec, Plain().eval(), "no transformers model", torch.randn(2, 4))
    run, _ = door(model, spec)
    with pytest.raises(BackendCompilerFailed, match="records gradients"):
        run(ids, use_cache=False)
    function, _ = door(lambda x: x + 1, spec)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="compile the model"):
        function(torch.ones(3))


def test_a_broken_graph_is_named(spec: Path) -> None:
    refused(spec, Plain(broken=True).eval(), "breaks its graph", torch.randn(2, 4))
    model = make_model("llama")
    layer = model.model.layers[1].mlp
    original = layer.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return original(x)

    layer.forward = broken
    refused(spec, model, r"graph breaks|breaks its graph", tokens(2, 6), use_cache=False)


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", make_model("llama"), "none.yaml", tokens(2, 6), use_cache=False)
