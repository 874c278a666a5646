"""Tiny random checkpoints and the edits that passes make, done by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import fx

from graphopt.frontend import capture_pretrained
from graphopt.ir.program import Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.shapes import propagate
from graphopt.ir.weights import Const, Take, Weight

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **SIZES),
    "llama_tied": lambda: transformers.LlamaConfig(tie_word_embeddings=True, **SIZES),
    "gemma": lambda: transformers.GemmaConfig(num_key_value_heads=1, head_dim=8, **SIZES),
    "gemma2": lambda: transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=8, **SIZES),
    "qwen2": lambda: transformers.Qwen2Config(num_key_value_heads=2, **SIZES),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a family and a dtype to the directory of a random model."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype).save_pretrained(directory)
            (directory / "tokenizer_config.json").write_text("{}")
            (directory / "modeling_evil.py").write_text("raise SystemExit")
            made[family, dtype] = directory
        return made[family, dtype]

    return make


@pytest.fixture(scope="session")
def captured(checkpoint: Callable[..., Path]) -> Callable[..., Program]:
    """A function from a family and a dtype to the Program of its checkpoint."""
    made: dict[tuple[str, torch.dtype], Program] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Program:
        if (family, dtype) not in made:
            made[family, dtype] = capture_pretrained(checkpoint(family, dtype))
        return made[family, dtype]

    return make


def copied(program: Program) -> Program:
    """The program over a graph of its own."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    return replace(program, graph=fx.GraphModule(torch.nn.Module(), graph))


def finished(program: Program) -> Program:
    """Clean up and propagate after an edit."""
    eliminate_dead_code(program.graph.graph)
    program.graph.recompile()
    live = set(program.weight_nodes)
    program = replace(program, weights=program.weights.only(live))
    propagate(program.graph, program.weights, program.dims, program.entry)
    return program


def without_layer(program: Program, layer: int) -> Program:
    """The Llama program with one block's output replaced by its input."""
    program = copied(program)
    path = f"model.layers.{layer}"
    nodes = list(program.graph.graph.nodes)
    rms_norm = torch.ops.graphopt.rms_norm.default
    norm = next(n for n in nodes if n.meta.get("path") == f"{path}.input_layernorm" and n.target is rms_norm)
    last = [n for n in nodes if n.meta.get("path") == path][-1]
    last.replace_all_uses_with(norm.args[0])
    return finished(program)


def taken(program: Program, *cuts: tuple[int, int, str]) -> Program:
    """The program with cuts (axis, how many entries stay, weight name endings separated by spaces) made together."""
    program = copied(program)
    weights = program.weights
    for axis, stay, endings in cuts:
        for name in list(weights):
            if name.endswith(tuple(endings.split())):
                weights = weights.with_expr(name, lambda e, a=axis, s=stay: Take(e, a, tuple(range(s))))
    return finished(replace(program, weights=weights))


def with_bias(program: Program, linear: str, value: float = 0.25) -> Program:
    """The program with a bias on the linear that reads weight `linear`."""
    program = copied(program)
    graph = program.graph.graph
    weight = program.weight_nodes[linear]
    user = next(iter(weight.users))
    name = linear.removesuffix("weight") + "bias"
    with graph.inserting_after(weight):
        bias = graph.placeholder(name.replace(".", "_"))
    bias.meta["weight"] = name
    user.args = (*user.args[:2], bias)
    rows = program.weights[linear].expr.shape[0]
    expr = Const(torch.full((rows,), value, dtype=program.dtype), program.dtype)
    return finished(replace(program, weights=program.weights.with_weight(Weight(name, expr))))
