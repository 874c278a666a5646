"""Counted costs equal what torch and the real modules say."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from graphopt.cost import cost, formula, node_flops
from graphopt.views import Views

SHAPES = ((1, 1), (2, 7), (3, 20))


def measured(program: Any, batch: int, length: int) -> int:
    """FLOPs that torch counts while the graph runs on zeros, attention by torch's own formula for it."""

    def attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    values = [
        torch.zeros(program.weights[node.meta["weight"]].expr.shape, dtype=torch.float32)
        for node in program.graph.graph.nodes
        if "weight" in node.meta
    ]
    inputs = [torch.ones(batch, length, dtype=spec.dtype) for spec in program.entry.inputs]
    mapping = {torch.ops.graphopt.attention: attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as mode:
        program.graph(*values, *inputs)
    return int(mode.get_total_flops())


def test_flops_and_parameters_equal_the_eager_model(family: str, config_of: Any, program_of: Any) -> None:
    from transformers import AutoModelForCausalLM

    config, found = config_of(family), cost(program_of(family))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for batch, length in SHAPES:
        with FlopCounterMode(display=False) as mode, torch.no_grad():
            model(torch.ones(batch, length, dtype=torch.long), use_cache=False)
        assert found.at(B=batch, S=length)["flops"] == mode.get_total_flops()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == 4 * found.parameters
    assert not found.uncounted
    assert not found.notes


def test_kv_bytes_equal_a_real_cache(family: str, config_of: Any, program_of: Any) -> None:
    from transformers import AutoModelForCausalLM

    config, found = config_of(family), cost(program_of(family))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(torch.ones(2, 5, dtype=torch.long), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.at(B=2, S=5)["kv_bytes"] == real
    assert found.at(B=1, S=1)["kv_bytes"] == found.kv_bytes_per_token


def test_windows_bound_the_cache(program_of: Any) -> None:
    assert formula(cost(program_of("mistral")).kv_bytes) == "384*B*min(S, 8)"
    assert formula(cost(program_of("gemma2")).kv_bytes) == "128*B*S + 256*B*min(S, 8)"
    found = cost(program_of("mistral"))
    assert found.at(B=1, S=8)["kv_bytes"] == found.at(B=1, S=4096)["kv_bytes"]


def test_parts_add_up(family: str, program_of: Any) -> None:
    found = cost(program_of(family))
    parts = found.breakdown
    everything = (*parts.blocks, *parts.outside)
    assert sum(part.parameters for part in everything) == found.parameters
    assert sum(part.bytes for part in everything) == found.bytes
    assert sympy.expand(sum(part.flops for part in everything) - found.flops) == 0
    assert sympy.expand(sum(part.kv_bytes for part in everything) - found.kv_bytes) == 0
    assert len(parts.blocks) == 3
    assert [formula(part.flops) for part in parts.outside if part.kind == "head"] == ["4,096*B*S"]
    for block, views in zip(parts.blocks, parts.views, strict=True):
        assert sum(view.parameters for view in views) == block.parameters
        assert [view.kind for view in views][:2] == ["attention", "feed_forward"]
        assert all(view.flops != 0 for view in views[:2])


@pytest.mark.parametrize("name", ["llama", "llama_gqa", "gpt2", "gemma2", "qwen3", "mistral"])
def test_uneven_programs_count_as_they_run(name: str, program_of: Any, uneven: Any) -> None:
    before, after = program_of(name), uneven(program_of(name))
    was, now = cost(before), cost(after)
    for batch, length in SHAPES:
        assert was.at(B=batch, S=length)["flops"] == measured(before, batch, length)
        assert now.at(B=batch, S=length)["flops"] == measured(after, batch, length)
    assert now.parameters == sum(
        torch.Size(weight.expr.shape).numel() for weight in after.weights.weights.values() if weight.kind == "parameter"
    )
    assert now.parameters < was.parameters
    first, second = (part.kv_bytes for part in now.breakdown.blocks)
    heads = Views(before).attentions[0].kv_heads
    at = {symbol: 4 for symbol in now.kv_bytes.free_symbols}
    assert heads * first.subs(at) == second.subs(at)


def test_an_op_without_a_formula_is_listed() -> None:
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft(x).real @ x.transpose(-1, -2)

    program = capture_module(Odd(), (Input("x", ("B", "S", 8), torch.float32),))
    found = cost(program)
    assert found.uncounted == {"aten.fft_fft.default": 1}
    assert formula(found.flops) == "16*B*S**2"


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, y: torch.einsum("bsd,btd->bst", x, y), ((2, 5, 4), (2, 3, 4))),
        (lambda x, y: torch.baddbmm(torch.zeros(2, 5, 3), x, y), ((2, 5, 4), (2, 4, 3))),
        (lambda x, y: torch.nn.functional.conv1d(x, y, padding=1, groups=2), ((2, 4, 9), (6, 2, 3))),
        (lambda x, y: torch.nn.functional.conv2d(x, y), ((2, 4, 9, 8), (6, 4, 3, 2))),
        (lambda x, y: torch.matmul(x, y), ((2, 1, 5, 4), (3, 4, 6))),
        (lambda x, y: torch.addmm(torch.zeros(3), x, y), ((5, 4), (4, 3))),
    ],
)
def test_products_count_as_torch_counts_them(function: Any, shapes: Any) -> None:
    class Call(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return function(x, y)

    inputs = tuple(torch.zeros(shape) for shape in shapes)
    graph = torch.export.export(Call(), inputs, strict=False).graph_module.graph
    with FlopCounterMode(display=False) as mode:
        function(*inputs)
    counts = [node_flops(node) for node in graph.nodes]
    assert None not in counts
    assert sum(counts) == mode.get_total_flops() > 0


def test_formulae_are_readable() -> None:
    b, s = sympy.symbols("B S", positive=True, integer=True)
    assert formula(4390912 * b * s + 1536 * b * s**2) == "4,390,912*B*S + 1,536*B*S**2"
    assert formula(0) == "0"
    assert formula(b * s - 3 * b) == "-3*B + B*S"
    assert formula(2048 * b * sympy.Min(s, 4096)) == "2,048*B*min(S, 4,096)"
    half = FloorDiv(s + 1, 2)
    assert formula(half) == "(S + 1)//2"
    assert formula(4096 * half) == "4,096*((S + 1)//2)"
    assert formula(b * half + 3) == "3 + B*((S + 1)//2)"


def test_a_missing_size_is_named(program_of: Any) -> None:
    with pytest.raises(KeyError, match="S"):
        cost(program_of("llama")).at(B=1)
