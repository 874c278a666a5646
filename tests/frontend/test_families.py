"""Captured programs equal the models they came from, at shapes that were not captured, padding included."""

from __future__ import annotations

import pytest
import torch

from graphopt.frontend import capture_model
from graphopt.views import Views
from tests.tiny import CONFIGS, make_model, program, tokens


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_program_equals_model_where_it_was_not_captured(name: str) -> None:
    model = make_model(name)
    # transformers 5.17 leaves the soft cap of Gemma 2 out of its fast attention.
    model.set_attn_implementation("eager")
    runner = program(name).module(torch.float32)
    for batch, seq in ((1, 1), (2, 5), (3, 40)):
        ids = tokens(batch, seq)
        padding = torch.ones_like(ids)
        if batch > 1 and seq > 2:
            padding[-1, : seq // 3] = 0
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": padding, "position_ids": positions}
        taken = {spec.name for spec in program(name).entry.inputs}
        given = {key: value for key, value in given.items() if key in taken}
        with torch.no_grad():
            expected = model(**given, use_cache=False).logits
        got = runner(**given)[0]
        real = padding.bool()
        torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_layer_is_seen(name: str) -> None:
    views = Views(program(name))
    config = CONFIGS[name][1]
    assert len(views.blocks) == config.get("num_hidden_layers", 3)
    assert all(len(block.attentions) == 1 for block in views.blocks)
    routed = [
        "num_experts_per_tok" in config and i >= config.get("first_k_dense_replace", 0)
        for i in range(len(views.blocks))
    ]
    assert [len(block.experts) for block in views.blocks] == [int(bank) for bank in routed]
    # A bank of these two has an expert beside it that every token goes to.
    shared = name in ("qwen2_moe", "deepseek_v3")
    assert [len(block.feed_forwards) for block in views.blocks] == [int(shared or not bank) for bank in routed]
    kv_heads = config.get("num_key_value_heads", config.get("num_kv_heads", 1 if name == "falcon" else 4))
    assert {(a.heads, a.kv_heads, a.head_dim) for a in views.attentions} == {(4, kv_heads, 8)}
    # The keys of a multi-latent attention come from two projections.
    latent = len(views.attentions) * (name == "deepseek_v3")
    assert [one.reason for one in views.unseen] == ["k is no plain projection"] * latent


def test_capture_leaves_the_model_alone() -> None:
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    capture_model(model)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ties_are_one_weight() -> None:
    model = make_model("llama_mha")
    weights = program("llama_mha").weights
    assert weights.parameters == sum(p.numel() for p in model.parameters())
    assert "model.embed_tokens.weight" in weights
    assert weights["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
