"""Skipping layers: index lists from the paper's code, surgery equals a branch times zero, parts, clear refusals."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graphopt.diagnostics import PlanError
from graphopt.frontend import capture_config, capture_model
from graphopt.observe import observe
from graphopt.passes.depth.formula import evenly, reserved
from graphopt.passes.depth.skip_layers import SkipLayers
from graphopt.passkit import Anchor, Context, Cut, Plan
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.views import Views, leaves
from tests.tiny import make_model, tokens

GOLDEN = {
    (30, 3): (*range(0, 25, 3), 29),
    (30, 5): (0, 6, 12, 18, 24, 29),
    (30, 10): (0, 15, 29),
    (32, 2): (*range(0, 29, 2), 31),
    (32, 3): (*range(0, 25, 3), 31),
    (32, 5): (0, 6, 12, 18, 24, 31),
    (32, 10): (0, 16, 31),
}


@pytest.mark.parametrize(("shape", "kept"), GOLDEN.items())
def test_unified_formula(shape: tuple[int, int], kept: tuple[int, ...]) -> None:
    assert reserved(*shape) == kept


def test_formula_keeps_ends_and_count() -> None:
    for layers in range(2, 49):
        assert reserved(layers, 1) == tuple(range(layers))
        for speedup in (1.1, 1.25, 1.5, 2, 3, 4.5, 7, 10):
            for spacing in ("upstream", "linspace"):
                if spacing == "upstream" and int(layers / speedup) < 2:
                    with pytest.raises(ValueError, match="fewer than the first and the last"):
                        reserved(layers, speedup)
                    continue
                kept = reserved(layers, speedup, spacing)
                assert len(set(kept)) == len(kept) == max(2, int(layers / speedup))
                assert kept == tuple(sorted(kept))
                assert (kept[0], kept[-1]) == (0, layers - 1)
        for remove in range(layers - 1):
            assert len(evenly(layers, remove)) == remove


@cache
def views(name: str, layers: int = 4) -> Views:
    key = "n_layer" if name in ("gpt2", "bloom") else "num_hidden_layers"
    return Views(capture_model(make_model(name, **{key: layers})))


def planned(v: Views, where: tuple[int, ...] | None = None, **fields: Any) -> Plan:
    config = SkipLayers.model_validate(fields)
    context = Context(v, tuple(range(len(v.blocks))) if where is None else where)
    taps = config.observe(context)
    statistics = observe(v.program, taps, [{"input_ids": tokens(4, 16)}], views=v) if taps else None
    return config.plan(Context(v, context.layers, statistics))


def indices(plan: Plan) -> list[int]:
    return [edit.to_json()["index"] for edit in plan.edits]


@pytest.mark.parametrize("name", ["llama", "llama_mha", "gpt2", "neox", "gemma2", "olmo2", "phi"])
@pytest.mark.parametrize(
    "fields",
    [{"layers": [1, -1]}, {"speedup": 2.0}, {"remove": 1}, {"remove": 2, "part": "attention", "choose": "last"},
     {"layers": [0, 2], "part": "feed_forward"}],
    ids=str,
)  # fmt: skip
def test_surgery_equals_zero_branch(name: str, fields: dict[str, Any]) -> None:
    v = views(name)
    plan = planned(v, **fields)
    assert {edit.candidate.split(":")[0] for edit in plan.edits} | {d.candidate for d in plan.declines} == {
        block.path for block in v.blocks
    }
    if not plan.edits:
        assert name in ("neox", "phi")
        assert all("side by side" in decline.reason for decline in plan.declines)
        return
    after = apply_edits(v.program, v, plan.edits)
    mine, theirs = after.module(torch.float64), emulate_edits(v.program, v, plan.edits).module(torch.float64)
    for batch, seq in ((1, 1), (2, 7), (3, 21)):
        given = {"input_ids": tokens(batch, seq)}
        assert torch.equal(mine(**given)[0], theirs(**given)[0])
    if fields.get("part", "block") == "block":
        assert len(Views(after).blocks) == 4 - len(plan.edits)
    assert after.weights.parameters < v.program.weights.parameters


def test_block_influence_takes_the_idlest_block() -> None:
    model = make_model("llama", num_hidden_layers=4)
    with torch.no_grad():
        for projection in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            projection.weight.mul_(1e-3)
    v = Views(capture_model(model))
    plan = planned(v, remove=1)
    assert indices(plan) == [2]
    assert all("is not among the 1 lowest" in decline.reason for decline in plan.declines)
    assert set(plan.notes["influence"]) == {"0", "1", "2", "3"}
    assert indices(planned(v, (0, 1), remove=1)) in ([0], [1])


def test_choices() -> None:
    v = views("llama")
    assert indices(planned(v, remove=2, choose="last")) == [2, 3]
    assert indices(planned(v, (0, 1, 2), remove=1, choose="last")) == [2]
    assert indices(planned(v, remove=1, choose="evenly")) == [1]
    assert indices(planned(v, speedup=1)) == []
    assert [d.reason for d in planned(v, (0, 1), layers=[1]).declines].count("outside where") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speedup": 4.0}, "cannot make 4 layers 4 times faster"),
        ({"remove": 4, "choose": "last"}, "cannot take 4 of 4 layers out"),
        ({"remove": 3, "choose": "evenly"}, "cannot spread 3 over 4"),
        ({"layers": "all"}, "would take out all 4 layers"),
        ({"layers": [4]}, "there is no layer 4"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        planned(views("llama"), **fields)


def test_upstream_division_by_zero_names_the_way_out() -> None:
    v = views("llama", 12)
    with pytest.raises(PlanError, match="cannot make 12 layers 10 times faster") as caught:
        planned(v, speedup=10)
    assert caught.value.notes == ("int(12 / 10) is 1, and the first and last stay",)
    assert caught.value.diagnostics[0].help == ("use a speedup of at most 6, or spacing: linspace",)
    assert len(planned(v, speedup=10, spacing="linspace").edits) == 10


@pytest.mark.parametrize(
    "fields", [{}, {"layers": [1], "remove": 2}, {"speedup": 2, "choose": "last"}, {"speedup": 0.5}, {"remove": 0}]
)
def test_fields_that_make_no_sense(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SkipLayers.model_validate(fields)


def test_without_calibration_or_blocks() -> None:
    v = views("llama")
    with pytest.raises(PlanError, match="needs calibration text"):
        SkipLayers(remove=1).plan(Context(v, (0, 1, 2, 3)))
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    plain = capture_module(torch.nn.Linear(4, 4), (Input("input", ("B", 4), torch.float32),))
    plan = SkipLayers(remove=1, choose="last").plan(Context(Views(plain), ()))
    assert [d.reason for d in plan.declines] == ["no repeated residual structure was found, so there are no layers"]


def test_golden_count_of_qwen3_8b() -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    program = capture_config(config, dtype=torch.bfloat16)
    v = Views(program)
    shallow = apply_edits(program, v, planned(v, remove=4, choose="evenly").edits)
    v = Views(shallow)
    anchor = Anchor.of(v, next(leaves(v.hidden)))
    narrow = apply_edits(shallow, v, (Cut("residual", "hidden", anchor, tuple(range(3840)), 4096, at="producers"),))
    assert narrow.weights.parameters == 6_955_265_792
