"""Tiny random models that tests share: configs by name, checkpoints on disk, programs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from graphopt.frontend import capture_model
from graphopt.ir.program import Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import apply_edits
from graphopt.views import Views

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 56}
_ROUTED = {**_GATED, "num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": 2}
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "llama_mha": ("LlamaConfig", {**_GATED, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama_mqa": ("LlamaConfig", {**_GATED, "num_key_value_heads": 1}),
    "llama_bias": ("LlamaConfig", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("GPT2Config", _GPT2),
    "neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 56}),
    "gemma2": ("Gemma2Config", {**_GATED, "head_dim": 8, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 8}),
    "phi": ("PhiConfig", {**_COMMON, "intermediate_size": 56}),
    "phi3": ("Phi3Config", _GATED),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 56, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 8}),
    "olmo2": ("Olmo2Config", _GATED),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0}),
    "falcon": ("FalconConfig", _COMMON),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "cohere": ("CohereConfig", _GATED),
    "mixtral": ("MixtralConfig", {**_ROUTED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_ROUTED, "head_dim": 8, "moe_intermediate_size": 12, "num_experts": 6}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_ROUTED, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 6},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_ROUTED,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 12,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": ("GptOssConfig", {**_ROUTED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8}),
}

_PAIR = {"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None}
_STACKS = {
    f"{stack}_{size}": count
    for stack in ("encoder", "decoder")
    for size, count in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 56))
}
TEXT_TO_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", {**_PAIR, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}),
    "bart": ("BartConfig", {**_PAIR, **_STACKS, "max_position_embeddings": 64}),
    "marian": ("MarianConfig", {**_PAIR, **_STACKS, "max_position_embeddings": 64}),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of a named tiny config, float32, with weights large enough to matter."""
    auto = transformers.AutoModelForCausalLM if name in CONFIGS else transformers.AutoModelForSeq2SeqLM
    kind, values = CONFIGS[name] if name in CONFIGS else TEXT_TO_TEXT[name]
    config = getattr(transformers, kind)(**{**values, **changes})
    torch.manual_seed(seed)
    model = auto.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@cache
def program(name: str, seed: int = 0) -> Program:
    """A captured tiny model; programs are values, so tests may share them."""
    return capture_model(make_model(name, seed))


def after(program: Program, *steps: dict[str, Any]) -> Program:
    """A program after some steps as a spec writes them."""
    for options in steps:
        given = json.dumps({key: value for key, value in options.items() if key != "use"})
        views = Views(program)
        plan = PassRegistry().get(options["use"]).model_validate_json(given).plan(Context(views, tuple(range(9))))
        assert plan.edits, plan.declines
        program = apply_edits(program, views, plan.edits)
    return program


def checkpoint(directory: Path, name: str, **changes: Any) -> Path:
    """A tiny random checkpoint on disk."""
    make_model(name, **changes).save_pretrained(directory)
    return directory


def tokens(batch: int, seq: int, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, seq]`."""
    return torch.randint(3, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(seed))
