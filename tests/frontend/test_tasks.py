"""Models of other tasks, from their config class alone: captured, equal to eager at another shape, parts in view."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from graphopt.compiler.verify import random_inputs
from graphopt.frontend import capture_model, capture_pretrained
from graphopt.views import Views

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
# Class, config, attentions (self and cross).
TASKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "masked language model": ("BertForMaskedLM", _TEXT, 2),
    "one layer used twice": ("AlbertForMaskedLM", {**_TEXT, "embedding_size": 16}, 2),
    "classification": (
        "RobertaForSequenceClassification",
        {**_TEXT, "num_labels": 3, "bos_token_id": 1, "eos_token_id": 2},
        2,
    ),
    "text to text": (
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "pad_token_id": 0},
        6,
    ),
    "text to text, learnt positions": ("BartForConditionalGeneration", {**_BART, "max_position_embeddings": 64}, 6),
    "speech to text": (
        "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64},
        6,
    ),
    "image classification": ("ViTForImageClassification", {**_TEXT, "image_size": 32, "patch_size": 8}, 2),
    "experts": (
        "MixtralForCausalLM",
        {**_TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        2,
    ),
    "a mask that multiplies scores": (
        "OpenAIGPTLMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96},
        2,
    ),
    "scores bounded from below": (
        "XGLMForCausalLM",
        {"vocab_size": 96, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 56, "pad_token_id": 0},
        2,
    ),
    "packed queries with biases of their own": ("DebertaForMaskedLM", _TEXT, 2),
    "scores scaled for each head": (
        "Swinv2ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        2,
    ),
    "fewer keys than queries, filters in feed-forwards": (
        "SegformerForImageClassification",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [4, 2],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        2,
    ),
    "attention in batch norms": ("LevitForImageClassification", {"image_size": 64, "depths": [1, 1, 1]}, 5),
    "attention over depth, sinks for each query": (
        "Inkling2ForCausalLM",
        {
            **_TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        4,
    ),
    "a Fourier transform for attention": ("FNetForMaskedLM", _TEXT, 0),
    "samples of sound": (
        "MoonshineForConditionalGeneration",
        {
            **_TEXT,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
        },
        6,
    ),
    "learnt queries": (
        "DetrForObjectDetection",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 56,
            "decoder_ffn_dim": 56,
            "num_queries": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
        },
        6,
    ),
    "time series in patches": (
        "PatchTSTForPrediction",
        {
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 2,
            "prediction_length": 4,
            "d_model": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 56,
        },
        2,
    ),
    "time series": (
        "PatchTSMixerForPrediction",
        {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 2, "prediction_length": 4},
        0,
    ),
}


def test_what_a_class_computes_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    config = transformers.MarianConfig(**_BART, max_position_embeddings=64, scale_embedding=True)
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config).eval()
    model.save_pretrained(tmp_path)
    program = capture_pretrained(tmp_path)
    inputs = random_inputs(program, {"B": 1, "S": 11, "T": 7}, 0)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_classes_that_read_the_token_which_ends_a_text() -> None:
    config = transformers.BartConfig(**_BART, max_position_embeddings=64, num_labels=3)
    torch.manual_seed(0)
    model = transformers.BartForSequenceClassification(config).eval()
    program = capture_model(model)
    assert [spec.name for spec in program.entry.inputs] == ["input_ids", "attention_mask"]
    ids = torch.randint(3, 96, (2, 9))
    ids[0, 4] = ids[0, 8] = ids[1, 2] = ids[1, 6] = config.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**inputs)[0], model(**inputs).logits, rtol=1e-4, atol=1e-4)


_WITHOUT_ATTENTION = {"FNetForMaskedLM": "fourier", "PatchTSMixerForPrediction": "projection"}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_another_task(task: str) -> None:
    name, values, attentions = TASKS[task]
    cls = getattr(transformers, name, None)
    if cls is None:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = cls.config_class(**{key: value for key, value in values.items() if hasattr(cls.config_class(), key)})
    model = cls(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    program = capture_model(model)
    assert all(dim.low < dim.high for dim in program.dims)
    lengths = [2 * dim.low + 1 for dim in program.dims if dim.name == "S"]
    inputs = random_inputs(program, {"B": 2, "S": max(11, *lengths, 0), "T": 7}, 0)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        expected = model(**inputs)
        got = dict(zip(program.entry.outputs, program.module()(**inputs), strict=True))
    main = "logits" if "logits" in got else "prediction_outputs"
    real: Any = ...
    if "attention_mask" in inputs and got[main].shape[:2] == inputs["attention_mask"].shape:
        real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[main][real], expected[main][real], rtol=1e-4, atol=1e-4)
    views = Views(program)
    assert len(views.attentions) == attentions
    if name in _WITHOUT_ATTENTION:
        assert {mixer.kind for mixer in views.mixers} == {_WITHOUT_ATTENTION[name]}
    if name == "DetrForObjectDetection":
        stacks = [(block.stack, len(block.attentions)) for block in views.blocks if block.attentions]
        assert stacks == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert views.blocks or any(part.what == "blocks" for part in views.unseen)
