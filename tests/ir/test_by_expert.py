"""Banks that run expert by expert give what the graph says: every choice on its own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.ir import by_expert
from graphopt.ir.by_expert import ByExpert, lower_banks
from graphopt.ir.grouped import group, lower_choices
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.run import Runner, specialised
from graphopt.passkit import PassRegistry
from graphopt.testing.trial import given, trial
from graphopt.views import Views
from tests.tiny import program


def parts(runner: Runner) -> list[ByExpert]:
    return [one for one in runner.graph.children() if isinstance(one, ByExpert)]


def both(one: Program, sizes: dict[str, int]) -> tuple[Runner, Any, Any]:
    """A program's runner, its results, and those of the graph as it stands."""
    fast, plain = Runner(one, torch.float64, "cpu"), Runner(one, torch.float64, "cpu")
    plain.graph = specialised(one, torch.float64, "cpu")
    inputs = given(one, sizes, 0)
    return fast, fast(**inputs), plain(**inputs)


def refactored(name: str, **options: Any) -> Program:
    kind = PassRegistry().get("refactor_moe")
    return trial(kind.model_validate_json(json.dumps({"experts": 3, **options})), program(name)).after


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize(
    ("sizes", "together"), [({"B": 2, "S": 9}, 0), ({"B": 2, "S": 9}, 1 << 19), ({"B": 1, "S": 1}, 0)]
)
def test_stock_banks(name: str, sizes: dict[str, int], together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_expert, "TOGETHER", together)
    fast, got, expected = both(program(name), sizes)
    assert len(parts(fast)) == len(Views(program(name)).experts)
    # Tokens are read once, not once for each choice, and added up as they are made.
    assert all(set(part.repeats) == {1, 2} and part.chosen == 2 for part in parts(fast))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama_bias"])
@pytest.mark.parametrize(
    "options",
    [
        {"router": {"kind": "random"}, "choose": {"kind": "top", "k": 2}},
        {"router": {"kind": "random"}, "choose": {"kind": "threshold", "least": 0.9}, "weights": "one"},
        {"router": {"kind": "random"}, "choose": {"kind": "rank", "rank": 2}, "shared": "25%"},
    ],
    ids=["top", "threshold", "rank"],
)
@pytest.mark.parametrize("together", [0, 1 << 19])
def test_refactored_banks(name: str, options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_expert, "TOGETHER", together)
    fast, got, expected = both(refactored(name, **options), {"B": 2, "S": 9})
    assert len(parts(fast)) == 3
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)


def test_what_is_read_within_a_bank_keeps_the_order_of_the_choices() -> None:
    rewriter = Rewriter(program("mixtral"))
    for i, bank in enumerate(Views(program("mixtral")).experts):
        rewriter.add_output(f"hidden{i}", rewriter.node(bank.down.x))
    fast, got, expected = both(rewriter.finish(), {"B": 2, "S": 9})
    assert [len(part.rows.graph.output_node().args[0]) for part in parts(fast)] == [2, 2]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_product_that_waits_for_another_part_runs_on_its_own() -> None:
    # The second product reads a softmax over the rows of the first, so that no expert is done before all have begun.
    graph = fx.Graph()
    bank, index, x = (graph.placeholder(name) for name in ("bank", "index", "x"))
    values = {bank: torch.randn(3, 4, 4), index: torch.tensor([2, 0, 0, 2, 1]), x: torch.randn(5, 4, 1)}
    aten = torch.ops.aten
    first = graph.call_function(aten.bmm.default, (graph.call_function(aten.index.Tensor, (bank, [index])), x))
    mixed = graph.call_function(aten.softmax.int, (first, 0))
    second = graph.call_function(aten.bmm.default, (graph.call_function(aten.index.Tensor, (bank, [index])), mixed))
    graph.output((second,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    env = fx.Interpreter(module)
    expected = env.run(*values.values())[0]
    for node in graph.nodes:
        node.meta["val"] = values.get(node, torch.empty(5, 4, 4 if node.target is aten.index.Tensor else 1))
    lower_banks(module)
    lower_choices(graph)
    module.recompile()
    torch.testing.assert_close(module(*values.values())[0], expected)


def test_tokens_may_drop_all_their_choices() -> None:
    index, share = torch.tensor([2, 0, 1, 2]), torch.tensor([[0.5], [0.0], [0.0], [1.0]])
    assert group(index, 3, share).spans == [(2, 0, 2)]
    none = group(index, 3, torch.zeros(4, 1))
    assert none.spans == []
    assert torch.equal(none.index, index)
    assert len(group(index, 3, share.requires_grad_()).spans or ()) == 3


@pytest.mark.parametrize("numbers", [[2, 0, 1, 2], [1, 1, 1], [3], [0, 3, 2, 1, 0]])
@pytest.mark.parametrize("none", [[], [0]])
def test_few_choices_are_grouped_as_many_are(
    numbers: list[int], none: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, share = torch.tensor(numbers), torch.ones(len(numbers), 1)
    share[none] = 0
    few = group(index, 4, share)
    monkeypatch.setattr("graphopt.ir.grouped._FEW", 0)
    many = group(index, 4, share)
    assert few.spans == many.spans
    assert torch.equal(few.order, many.order)


@pytest.mark.parametrize("share", [[0.0, 0.0], [0.25, 0.0], [0.25, 0.75]])
def test_packed_banks_give_the_same_also_to_a_token_that_drops_all_its_choices(share: list[float]) -> None:
    part = parts(Runner(program("mixtral"), torch.float64, "cpu"))[0]
    torch.manual_seed(0)
    banks = [torch.randn(4, 48, 32).double(), torch.randn(4, 32, 24).double()]
    packed = [by_expert.PackedBank(lambda rows, matrix: rows @ matrix.t(), list(bank)) for bank in banks]
    index, counts, x = torch.tensor([3, 1]), torch.tensor(share).double(), torch.randn(1, 32).double()
    groups = group(index, 4, counts[:, None])
    (plain,), (fast,) = part(groups, *banks, x, counts), part(groups, *packed, x, counts)
    torch.testing.assert_close(fast, part.whole(index, *banks, x, counts)[0])
    torch.testing.assert_close(fast, plain)
    assert fast.shape == (1, 32)
    assert bool(fast.any()) == bool(counts.any())


def test_gradients_are_those_of_the_graph() -> None:
    one = program("mixtral")
    runner = Runner(one, torch.float64, "cpu")
    names = [node.meta["weight"] for node in one.graph.graph.nodes if "weight" in node.meta]
    plain = Runner(one, torch.float64, "cpu")
    plain.graph = specialised(one, torch.float64, "cpu")
    found = []
    for run in (runner, plain):
        run.values = [value.clone().requires_grad_(value.is_floating_point()) for value in run.values]
        run(**given(one, {"B": 2, "S": 5}, 0))[0].square().sum().backward()
        found.append({n: v.grad for n, v in zip(names, run.values, strict=True) if v.requires_grad})
    for name, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-9)
