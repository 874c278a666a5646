"""Tiny configs of several families, and programs captured from them without weights."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


def tiny_config(name: str) -> Any:
    """A tiny config by a short name."""
    kv = {"num_key_value_heads": 2}
    match name:
        case "llama":
            return transformers.LlamaConfig(**BASE, **IDS, num_key_value_heads=4, tie_word_embeddings=True)
        case "llama_gqa":
            return transformers.LlamaConfig(**BASE, **IDS, **kv, tie_word_embeddings=False)
        case "gpt2":
            return transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, **IDS)
        case "neox":
            return transformers.GPTNeoXConfig(**BASE, **IDS)
        case "gemma2":
            return transformers.Gemma2Config(**BASE, **IDS, **kv, head_dim=8, sliding_window=8)
        case "qwen3":
            return transformers.Qwen3Config(**BASE, **IDS, **kv, head_dim=16)
        case "mistral":
            return transformers.MistralConfig(**BASE, **IDS, **kv, sliding_window=8)
    raise ValueError(name)


FAMILIES = ("llama", "llama_gqa", "gpt2", "neox", "gemma2", "qwen3", "mistral")
_CAPTURED: dict[str, Any] = {}


def tiny_program(name: str) -> Any:
    """A program of a tiny config, captured once a session."""
    from graphopt.frontend import capture_config

    if name not in _CAPTURED:
        import torch

        _CAPTURED[name] = capture_config(tiny_config(name), dtype=torch.float32)
    return _CAPTURED[name]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture
def config_of() -> Any:
    """The function from a short name to a tiny config."""
    return tiny_config


@pytest.fixture
def program_of() -> Any:
    """The function from a short name to a captured program."""
    return tiny_program


def cut_unevenly(program: Any) -> Any:
    """A program whose layers differ: neurons and KV groups cut in layer 0, layer 2 skipped."""
    from graphopt.passkit import Anchor, Cut, Skip
    from graphopt.passkit.edits import apply_edits
    from graphopt.views import Views, unit_groups

    views = Views(program)
    edits: list[Any] = []
    neuron = next(group for group in unit_groups(views, "neuron") if group.layer == 0)
    keep = tuple(range(0, neuron.units, 3))
    edits.append(Cut(neuron.view, "neuron", Anchor.of(views, neuron.leaf), keep, neuron.units))
    heads = next(group for group in unit_groups(views, "kv_group") if group.layer == 0)
    edits.append(Cut(heads.view, "kv_group", Anchor.of(views, heads.leaf), (1,), heads.units))
    edits.append(Skip(views.blocks[2].path, 2))
    return apply_edits(program, views, tuple(edits))


@pytest.fixture
def uneven() -> Any:
    """The function from a program to one whose layers differ."""
    return cut_unevenly
