"""`torch.compile(model, backend="graphopt")`: graphs of all kinds against eager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from tests.tiny import make_model, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


class Small(nn.Module):
    """A layer with a norm; `broken` breaks the graph in the middle."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.broken = nn.Linear(8, 16), nn.LayerNorm(16), broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.up(x))
        if self.broken:
            torch._dynamo.graph_break()
        return torch.softmax(self.norm(hidden), -1)


def compiled(model: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    report: list[dict[str, Any]] = []
    return torch.compile(model, backend="graphopt", options={"report": report, **options}, dynamic=True), report


@pytest.mark.parametrize("interpret", [False, True])
def test_lengths_do_not_recompile(interpret: bool) -> None:
    model = Small().eval()
    run, report = compiled(model, interpret=interpret)
    with torch.no_grad():
        for length in (3, 5, 17):
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(run(x), model(x))
    assert len(report) == 1
    assert bool(report[0]["groups"]) == interpret


@pytest.mark.parametrize("interpret", [False, True])
def test_graph_breaks(interpret: bool) -> None:
    model = Small(broken=True).eval()
    run, report = compiled(model, interpret=interpret)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert len(report) == 2


@pytest.mark.parametrize("interpret", [False, True])
def test_training_graphs(interpret: bool) -> None:
    """Forward through us, backward delegated: gradients are eager's."""
    model, twin = Small(), Small()
    run, report = compiled(model, interpret=interpret)
    x = torch.randn(2, 5, 8)
    run(x).square().sum().backward()
    twin(x).square().sum().backward()
    for mine, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)
    assert report[0]["backward"] == "eager"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_transformer_under_the_interpreter(name: str) -> None:
    model = make_model(name)
    model.config.use_cache = False
    run, report = compiled(model, interpret=True)
    with torch.no_grad():
        for length in (6, 9):
            ids = tokens(2, length)
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert sum(len(graph["groups"]) for graph in report) > 5


def test_inductor_runs_what_a_cpu_gets() -> None:
    model = make_model("llama")
    model.config.use_cache = False
    run, report = compiled(model, cpu="inductor")
    with torch.no_grad():
        for length in (6, 9):
            ids = tokens(2, length)
            torch.testing.assert_close(run(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert [graph["mode"] for graph in report] == ["Inductor's C++"]


@pytest.mark.parametrize("interpret", [False, True])
def test_inductor_runs_the_backward(interpret: bool) -> None:
    model, twin = Small(), Small()
    run, report = compiled(model, interpret=interpret, backward="inductor")
    x = torch.randn(2, 5, 8)
    run(x).square().sum().backward()
    twin(x).square().sum().backward()
    for mine, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)
    assert report[0]["backward"] == "inductor"


def test_in_place_writes_reach_the_caller() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + y

    run, _ = compiled(function, interpret=True)
    x, y = torch.randn(5), torch.randn(5)
    mine, wanted = x.clone(), x.clone()
    torch.testing.assert_close(run(mine, y), function(wanted, y))
    torch.testing.assert_close(mine, wanted)


def test_report_file(tmp_path: Path) -> None:
    run = torch.compile(Small().eval(), backend="graphopt", options={"report": tmp_path / "report.json"})
    with torch.no_grad():
        run(torch.randn(2, 8))
    (graph,) = json.loads((tmp_path / "report.json").read_text())
    assert graph["mode"] == "eager library calls"
    assert graph["library"]["graphopt.backends.library.linear"] == 1


def test_wrong_options_are_named() -> None:
    with pytest.raises(BackendCompilerFailed, match="interprte"):
        compiled(Small(), interprte=True)[0](torch.randn(2, 8))
    with pytest.raises(BackendCompilerFailed, match="cpu is 'fast'"):
        compiled(Small(), cpu="fast")[0](torch.randn(2, 8))
