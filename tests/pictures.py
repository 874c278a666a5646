"""Tiny random models that look at pictures, captured once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from graphopt.frontend import capture_model
from graphopt.ir.program import Program

IMAGE, ENTRIES, SIDE = 90, 16, 16
_SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


def _filled(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def classifier() -> Any:
    """Three layers over 16 patches and a class token, pictures `[B, 1, 16, 16]`."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        **_SIZES, num_hidden_layers=3, image_size=SIDE, patch_size=4, num_channels=1, num_labels=3
    )
    return _filled(transformers.ViTForImageClassification(config))


def reader() -> Any:
    """A vision tower, a projector and a decoder of four layers; token 90 stands for one of a picture's 16 entries."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        **_SIZES, num_hidden_layers=3, image_size=SIDE, patch_size=4, projection_dim=16
    )
    text = transformers.LlamaConfig(
        **_SIZES, num_hidden_layers=4, num_key_value_heads=1, vocab_size=96, max_position_embeddings=256
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return _filled(transformers.LlavaForConditionalGeneration(config))


@cache
def classifier_program() -> Program:
    """The captured classifier."""
    return capture_model(classifier())


@cache
def reader_program() -> Program:
    """The captured reader of pictures and text."""
    return capture_model(reader())


def question(rows: int, text: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """A picture a row between two halves of a text: `input_ids` and `pixel_values`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (rows, text), generator=generator)
    placeholders = torch.full((rows, ENTRIES), IMAGE)
    ids = torch.cat([ids[:, : text // 2], placeholders, ids[:, text // 2 :]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator)}
