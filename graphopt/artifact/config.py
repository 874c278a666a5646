"""The config class of graphopt checkpoints, as transformers' AutoConfig knows it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from graphopt.artifact.native_names import MODEL_TYPE


class GraphoptConfig(PretrainedConfig):  # type: ignore[misc]
    """Facts that generate() and tokenizers read; the model itself is in graph.txt."""

    model_type = MODEL_TYPE

    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = False
    is_encoder_decoder: bool = False
    graphopt_version: str | None = None
    source_config: dict[str, Any] | None = None
    source_name: str | None = None
    source_architecture: str | None = None


def register_config() -> None:
    """Make `AutoConfig` return GraphoptConfig for model_type graphopt."""
    AutoConfig.register(MODEL_TYPE, GraphoptConfig, exist_ok=True)
