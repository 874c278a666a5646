"""Edited programs become stock checkpoints when a config can say it, and only then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import copied, finished, taken, with_bias, without_layer

from graphopt.artifact import load, save
from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.weights import Affine

IDS = torch.tensor([[5, 7, 11, 13, 17, 19], [3, 4, 9, 8, 21, 60]])
Capture = Callable[..., Program]


def check_stock(program: Program, directory: Path) -> transformers.PretrainedConfig:
    report = save(program, directory)
    assert report.format == "transformers", report.reasons
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    expected = program.module(torch.float32)(input_ids=IDS)[0]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
    return model.config


def check_native(program: Program, directory: Path) -> tuple[str, ...]:
    with pytest.raises(ArtifactError) as refused:
        save(program, directory, format="transformers")
    assert refused.value.code == "no_stock_config"
    report = save(program, directory)
    assert report.format == "graphopt"
    assert report.reasons == refused.value.notes
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(model(input_ids=IDS).logits, program.module(None)(input_ids=IDS)[0])
    return report.reasons


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_fewer_layers(captured: Capture, family: str, tmp_path: Path) -> None:
    config = check_stock(without_layer(captured(family), 1), tmp_path / "out")
    assert config.num_hidden_layers == 2


def test_layer_types_follow_the_layers_that_stay(captured: Capture, tmp_path: Path) -> None:
    program = captured("gemma2")
    original = transformers.AutoConfig.from_pretrained(program.origin.path)
    config = check_stock(without_layer(program, 1), tmp_path / "out")
    assert config.layer_types == [original.layer_types[0], original.layer_types[2]]


def test_fewer_neurons(captured: Capture, tmp_path: Path) -> None:
    program = taken(captured("llama"), (0, 40, "gate_proj.weight up_proj.weight"), (1, 40, "down_proj.weight"))
    config = check_stock(program, tmp_path / "out")
    assert config.intermediate_size == 40


def test_an_inner_width_that_the_config_leaves_to_its_default(captured: Capture, tmp_path: Path) -> None:
    program = copied(captured("gpt2"))
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.reshape.default and node.args[1][-1] == 128:
            node.args = (node.args[0], [*node.args[1][:-1], 100])
    cuts = (1, 100, "c_fc.weight"), (0, 100, "c_fc.bias mlp.c_proj.weight")
    assert check_stock(taken(program, *cuts), tmp_path / "out").n_inner == 100


def test_fewer_heads_kv_heads_and_layers_at_once(captured: Capture, tmp_path: Path) -> None:
    program = without_layer(captured("llama"), 2)
    cuts = (0, 16, "q_proj.weight"), (0, 8, "k_proj.weight v_proj.weight"), (1, 16, "o_proj.weight")
    config = check_stock(taken(program, *cuts), tmp_path / "out")
    found = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert found == (2, 2, 1, 8)


def test_fewer_kv_heads(captured: Capture, tmp_path: Path) -> None:
    config = check_stock(taken(captured("llama"), (0, 8, "k_proj.weight v_proj.weight")), tmp_path / "out")
    assert config.num_key_value_heads == 1


def test_narrower_stream_with_its_eps(captured: Capture, tmp_path: Path) -> None:
    readers = "q_proj.weight k_proj.weight v_proj.weight gate_proj.weight up_proj.weight embed_tokens.weight"
    rows, columns = "norm.weight o_proj.weight down_proj.weight", f"{readers} lm_head.weight"
    program = copied(taken(captured("llama"), (0, 24, rows), (1, 24, columns)))
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.graphopt.rms_norm.default:
            node.args = (*node.args[:2], 2e-6, *node.args[3:])
    config = check_stock(finished(program), tmp_path / "out")
    assert (config.hidden_size, config.rms_norm_eps, config.head_dim) == (24, 2e-6, 8)


@pytest.mark.parametrize(("linear", "flag"), [("o_proj", "attention_bias"), ("down_proj", "mlp_bias")])
def test_a_new_bias_sets_the_flag_and_zeros_the_rest(captured: Capture, linear: str, flag: str, tmp_path: Path) -> None:
    part = "self_attn" if linear == "o_proj" else "mlp"
    program = with_bias(captured("llama"), f"model.layers.1.{part}.{linear}.weight")
    config = check_stock(program, tmp_path / "out")
    assert getattr(config, flag) is True
    assert load(tmp_path / "out").weights[f"model.layers.0.{part}.{linear}.bias"].expr.shape == (32,)


def test_both_biases(captured: Capture, tmp_path: Path) -> None:
    program = with_bias(captured("llama"), "model.layers.1.self_attn.o_proj.weight")
    config = check_stock(with_bias(program, "model.layers.0.mlp.down_proj.weight"), tmp_path / "out")
    assert config.attention_bias
    assert config.mlp_bias


def test_untied_heads_change_the_tie(captured: Capture, tmp_path: Path) -> None:
    program = copied(captured("llama_tied"))
    weight = program.weights["model.embed_tokens.weight"]
    head = replace(weight, name="lm_head.weight", expr=Affine(weight.expr, 2.0), aliases=())
    node = program.weight_nodes[weight.name]
    graph = program.graph.graph
    with graph.inserting_after(node):
        placeholder = graph.placeholder("lm_head_weight")
    placeholder.meta["weight"] = head.name
    linear = next(user for user in node.users if user.target is torch.ops.aten.linear.default)
    linear.replace_input_with(node, placeholder)
    store = program.weights.with_weight(head).with_weight(replace(weight, aliases=()))
    config = check_stock(finished(replace(program, weights=store)), tmp_path / "out")
    assert config.tie_word_embeddings is False


def test_different_heads_per_layer_have_no_config(captured: Capture, tmp_path: Path) -> None:
    part = "layers.1.self_attn"
    rows = f"{part}.q_proj.weight {part}.k_proj.weight {part}.v_proj.weight"
    program = taken(captured("llama_tied"), (0, 24, rows), (1, 24, f"{part}.o_proj.weight"))
    reasons = check_native(program, tmp_path / "out")
    assert "layers have different numbers of query heads: [4, 3, 4]" in reasons[0]


def test_different_widths_per_layer_have_no_config(captured: Capture, tmp_path: Path) -> None:
    rows = "layers.0.mlp.gate_proj.weight layers.0.mlp.up_proj.weight"
    program = taken(captured("llama"), (0, 40, rows), (1, 40, "layers.0.mlp.down_proj.weight"))
    reasons = check_native(program, tmp_path / "out")
    assert any("48" in reason and "40" in reason for reason in reasons)


def test_a_missing_sub_layer_has_no_config(captured: Capture, tmp_path: Path) -> None:
    program = copied(captured("llama"))
    nodes = [n for n in program.graph.graph.nodes if n.meta.get("path") == "model.layers.1"]
    nodes[-1].replace_all_uses_with(nodes[0])
    reasons = check_native(finished(program), tmp_path / "out")
    assert reasons


def test_an_activation_that_no_config_has(captured: Capture, tmp_path: Path) -> None:
    program = copied(captured("llama"))
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.silu.default:
            node.target = torch.ops.aten.tanh.default
    reasons = check_native(finished(program), tmp_path / "out")
    assert "aten.tanh" in reasons[0]
    assert "aten.silu" in reasons[0]


def test_bias_without_a_flag(captured: Capture, tmp_path: Path) -> None:
    reasons = check_native(with_bias(captured("gemma"), "model.layers.1.mlp.down_proj.weight"), tmp_path / "out")
    assert any("bias" in reason for reason in reasons)
