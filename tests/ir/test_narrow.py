"""Programs captured in float32 and run in bfloat16: as exact as the stock model in bfloat16, far into a text, too."""

from __future__ import annotations

import copy

import pytest
import torch

from graphopt.backends import lower
from graphopt.ir.narrow import narrowed
from graphopt.ir.text import parse_program
from graphopt.ir.weights import MemorySource
from graphopt.runtime import Decoder
from graphopt.runtime.with_cache import with_cache
from tests.tiny import make_model, program, tokens

LATE = slice(550, 600)


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "gpt_oss", "neox"])
def test_late_positions_are_as_exact_as_the_stock_models(name: str) -> None:
    model = make_model(name)
    stock = copy.deepcopy(model).to(torch.bfloat16)
    for narrow, wide in zip(stock.modules(), model.modules(), strict=True):
        # Loaded in bfloat16, a model computes its tables anew in float32; `to` rounds them.
        for key in wide._non_persistent_buffers_set:
            setattr(narrow, key, getattr(wide, key).clone())
    ids = tokens(1, LATE.stop)
    with torch.no_grad():
        exact, usual = model(ids).logits[:, LATE], stock(ids).logits[:, LATE]
    (mine,) = program(name).module(torch.bfloat16)(input_ids=ids)[:1]
    assert mine.dtype == torch.bfloat16
    assert (mine[:, LATE] - exact).abs().mean() < 1.5 * (usual - exact).abs().mean()


def test_a_cache_and_kernels_in_bfloat16_do_not_lose_exactness_along_the_text() -> None:
    source, ids = program("llama"), tokens(1, 300)
    exact = source.module()(input_ids=ids)[0]
    decoder = Decoder(with_cache(source)[0], dtype=torch.bfloat16)
    cache = decoder.cache(1, 300)
    prefill = decoder.step(cache, ids[:, :299])[0]
    cache.commit(299)
    stepwise = torch.cat([prefill, decoder.step(cache, ids[:, 299:])[0]], 1)
    kernels = lower(source, "cpu", interpret=True, dtype=torch.bfloat16)(input_ids=ids)[0]
    for found in (stepwise, kernels):
        assert found.dtype == torch.bfloat16
        error = (found - exact).abs().mean((0, 2))
        assert error[250:].mean() < 2 * error[:50].mean()
        assert error[-1] < 2 * error[:50].max()


def test_wider_and_equal_runs_take_the_program_itself() -> None:
    source = program("llama")
    assert narrowed(source, torch.float32) is source
    assert narrowed(source, torch.float64) is source


TEXT = """graphopt 1
dtype f32
dim B 1..8 hint 2
dim S 1..64 hint 5
input $ids i64[B, S] tokens
input $places i64[B, S] positions
weight @embed.weight parameter f32[7, 4]
weight @speeds constant f32[4]
%embed = aten.embedding.default(@embed.weight, $ids)
%far = aten.gt.Scalar($places, 2)
%farther = aten.unsqueeze.default(%far, -1)
%shown = aten.to.dtype(%farther, f32)
%place = aten.to.dtype($places, f32)
%row = aten.unsqueeze.default(%place, -1)
%angle = aten.mul.Tensor(%row, @speeds)
%turn = aten.cos.default(%angle)
%twice = aten.add.Tensor(%embed, %turn)
%again = aten.mul.Tensor(%twice, %turn)
%seen = aten.mul.Tensor(%again, %shown)
return logits = %seen
"""


def test_what_depends_on_integers_and_tables_keeps_its_dtype_until_it_meets_the_model() -> None:
    embed = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    one = parse_program(TEXT, {"speeds": torch.tensor([1.0, 0.5, 0.1, 0.01])}, MemorySource({"embed.weight": embed}))
    low = narrowed(one, torch.bfloat16)
    kinds = {name: node.meta["val"].dtype for name, node in low.nodes.items() if node.op == "call_function"}
    assert kinds["place"] == kinds["angle"] == kinds["turn"] == torch.float32
    # One cast for both readers; what only the model reads is narrow from the start.
    assert len(low.nodes) == len(one.nodes) + 1
    assert kinds["shown"] == kinds["twice"] == kinds["seen"] == torch.bfloat16
    ids, places = torch.tensor([[1, 2, 3]]), torch.tensor([[1001, 2003, 4005]])
    got = one.module(torch.bfloat16)(ids=ids, places=places)[0]
    wanted = one.module()(ids=ids, places=places)[0]
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
