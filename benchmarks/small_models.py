"""Small random models of every class in transformers' auto mappings, built from generic recipes: no table per model.

A recipe sets every size that a config knows by one of a few common names; the first recipe that a class builds and runs
with is taken. model_parts.py counts what they are made of.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

AUTOS = {
    "causal_lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "masked_lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "sequence_classification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForSequenceClassification",
    ),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image_classification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
    "speech_seq2seq": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
    "image_text_to_text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "time_series": ("MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES", "AutoModelForTimeSeriesPrediction"),
    "mask_generation": ("MODEL_FOR_MASK_GENERATION_MAPPING_NAMES", "AutoModelForMaskGeneration"),
    "object_detection": ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "AutoModelForObjectDetection"),
    "segmentation": ("MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES", "AutoModelForUniversalSegmentation"),
}
# The classes of each task that are run when not all are: the most used, and every kind of architecture once.
SELECTED = {
    "masked_lm": (
        "bert roberta distilbert albert electra deberta deberta-v2 modernbert mpnet esm fnet convbert longformer xlm-roberta"
    ),
    "sequence_classification": "bert roberta distilbert deberta-v2 modernbert t5 bart gpt2 llama qwen3 gemma2 mistral",
    "seq2seq": "t5 mt5 umt5 bart mbart marian pegasus led longt5 m2m_100 blenderbot switch_transformers t5gemma prophetnet",
    "image_classification": (
        "vit deit beit swin swinv2 convnext convnextv2 dinov2 resnet segformer siglip clip mobilevit levit hiera pvt"
    ),
    "speech_seq2seq": "whisper moonshine speech_to_text speecht5 kyutai_speech_to_text pop2piano seamless_m4t",
    "image_text_to_text": (
        "llava llava_next qwen2_vl qwen2_5_vl paligemma idefics2 idefics3 smolvlm blip blip-2 internvl gemma3 git kosmos-2"
    ),
    "time_series": "patchtsmixer patchtst timesfm timesfm2_5",
    "mask_generation": "sam sam2 sam_hq",
    "object_detection": "detr conditional_detr deformable_detr table-transformer rt_detr d_fine yolos",
    "segmentation": "detr maskformer mask2former eomt",
}
# Classes of the task that no auto class lists.
OUTSIDE_MAPPINGS = {"time_series": {"patchtsmixer": "PatchTSMixerForPrediction", "patchtst": "PatchTSTForPrediction"}}
LAYERS = 3
_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 56,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "d_ff": 56,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "d_model": 32,
    "image_size": 64,
    "patch_size": 16,
    "max_source_positions": 40,
    "max_target_positions": 128,
    "num_mel_bins": 16,
    "context_length": 32,
    "patch_length": 8,
    "patch_stride": 8,
    "prediction_length": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_token_id": 90,
    "image_token_index": 90,
    "projection_dim": 32,
}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
# Where the rotated part of a head is what the config calls its width.
_ROTATED = {"head_dim": 4, "num_key_value_heads": 4}
_INNER = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "state_size": 8,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "lru_width": 32,
    "num_heads": 4,
    "word_embed_proj_dim": 32,
    "mamba_expand": 2,
    "expand": 2,
    "num_v_heads": 4,
    "rope_theta": 10000.0,
    "shared_intermediate_size": 24,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
_WIDE_HEADS = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 112}
# A backbone of transformers' own where the default one needs another package.
_BACKBONE: dict[str, Any] = {
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
}
RECIPES: tuple[dict[str, Any], ...] = (
    _SIZES,
    _SIZES | _LATENT,
    _SIZES | _LATENT | _INNER,
    _SIZES | _INNER,
    _SIZES | {"num_key_value_heads": 4},
    _SIZES | _LATENT | _ROTATED,
    _SIZES | _LATENT | _INNER | _ROTATED,
    _SIZES | _LATENT | _INNER | {"num_key_value_heads": 4},
    _SIZES | _LATENT | _INNER | _WIDE_HEADS,
    _SIZES | _INNER | {"head_dim": 16},
    _SIZES | _BACKBONE,
    _SIZES | {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192},
    _SIZES | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 384},
    # The class's own sizes with fewer layers.
    {name: _SIZES[name] for name in ("vocab_size", "num_hidden_layers", "num_layers", "encoder_layers")}
    | {name: _SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
)
PARAMETERS = 200_000_000


class NotBuiltError(Exception):
    """No recipe builds the class; the message holds the first reason and the last."""


def model_types(auto: str) -> dict[str, Any]:
    """Class names by model type of one auto class."""
    return dict(getattr(modeling_auto, AUTOS[auto][0])) | OUTSIDE_MAPPINGS.get(auto, {})


def small_config(model_type: str, recipe: dict[str, Any]) -> Any:
    """The config class's own defaults with every size it has a name for made small, sub-configs included."""
    return _shrink(transformers.CONFIG_MAPPING[model_type], {}, recipe)


def _shrink(cls: Any, given: dict[str, Any], recipe: dict[str, Any]) -> Any:
    defaults = cls(**given)
    known = defaults.to_dict()
    values = dict(given)
    for name, value in recipe.items():
        own = defaults.attribute_map.get(name, name)
        if own in known or name in known:
            # A size that is given for each axis stays so.
            pair = isinstance(known.get(own, known.get(name)), list | tuple) and isinstance(value, int)
            values[own if own in known else name] = [value] * len(known.get(own, known.get(name))) if pair else value
    for name in defaults.sub_configs:
        part = getattr(defaults, name, None)
        if part is not None and name not in recipe:
            values[name] = _shrink(type(part), {}, recipe)
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        # The axes of a picture share the rotated pairs of a head among them.
        rope = known.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
        pairs = recipe.get("head_dim", 8) // 2
        values["rope_parameters"] = {**rope, "mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}
    if getattr(defaults, "is_encoder_decoder", False):
        values["decoder_start_token_id"] = recipe.get("decoder_start_token_id", 1)
    depth = getattr(defaults, "num_hidden_layers", None)
    for name, value in known.items():
        # Lists with an entry a layer: as many entries of each kind as there are layers.
        if isinstance(value, list) and value and isinstance(depth, int) and len(value) == depth > LAYERS:
            values[name] = _spread(value)
        elif isinstance(value, list) and name == "layer_types":
            values[name] = _spread(value * LAYERS)
    return cls(**values)


def _spread(kinds: list[Any]) -> list[Any]:
    """The first of each kind in order of appearance, then the first kinds again."""
    seen = list(dict.fromkeys(map(str, kinds)))
    first = [next(kind for kind in kinds if str(kind) == name) for name in seen]
    return (first + list(kinds))[:LAYERS]


def build(auto: str, model_type: str) -> tuple[Any, int]:
    """A small random model in float32 and the number of the recipe that made it; raises NotBuiltError."""
    refused: list[str] = []
    for number, recipe in enumerate(RECIPES):
        try:
            config = small_config(model_type, recipe)
            config.architectures = [_class_name(auto, model_type)]
            factory = _factory(auto, model_type)
            with torch.device("meta"):
                size = sum(p.numel() for p in factory(config).parameters())
            if size > PARAMETERS:
                refused.append(f"{size / 1e6:.0f}M parameters")
                continue
            torch.manual_seed(0)
            config = small_config(model_type, recipe)
            config.architectures = [_class_name(auto, model_type)]
            model = factory(config).eval().float()
            _randomise(model)
            run(model, sample_inputs(model))
        except Exception as error:
            refused.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:140]}")
            continue
        return model, number
    raise NotBuiltError(" | ".join(dict.fromkeys(refused)))


def _class_name(auto: str, model_type: str) -> str:
    """The class of a model type; the first where the mapping has several."""
    found = model_types(auto)[model_type]
    return str(found if isinstance(found, str) else found[0])


def _factory(auto: str, model_type: str) -> Any:
    outside = OUTSIDE_MAPPINGS.get(auto, {}).get(model_type)
    return getattr(transformers, outside)._from_config if outside else getattr(transformers, AUTOS[auto][1]).from_config


def _randomise(model: Any) -> None:
    """Weights large enough that every part shows in the result; those that are computed and never saved stay."""
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in computed:
                continue
            if parameter.dim() > 1:
                parameter.normal_(0, min(0.15, parameter.shape[-1] ** -0.5))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def sample_inputs(model: Any, batch: int = 2, seq: int = 19) -> dict[str, torch.Tensor]:
    """Random inputs at given sizes, for the inputs that graphopt would capture with; each row of tokens comes to an end."""
    from graphopt.frontend.signature import SOUND, model_inputs

    generator = torch.Generator().manual_seed(3)
    seq = SOUND if any(spec.name == "input_values" for spec in model_inputs(model)) else seq
    sizes = {"B": batch, "S": seq}
    made = {}
    for spec in model_inputs(model):
        shape = [sizes.get(size, seq) if isinstance(size, str) else size for size in spec.shape]
        if spec.role == "tokens":
            made[spec.name] = ended(model, torch.randint(3, 90, shape, generator=generator))
        elif spec.role == "padding":
            made[spec.name] = torch.ones(shape, dtype=spec.dtype)
        elif spec.role == "positions":
            made[spec.name] = torch.arange(shape[1]).expand(shape)
        elif spec.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator)
        else:
            made[spec.name] = torch.zeros(shape, dtype=spec.dtype)
    return made


def ended(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens with the one that ends a text last in each row and nowhere else: some classes read what is there."""
    end = getattr(model.config, "eos_token_id", None)
    if not isinstance(end, int) or not 0 <= end < 90:
        return tokens
    tokens = tokens.masked_fill(tokens == end, end + 1)
    tokens[:, -1] = end
    return tokens


def run(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The model's own result, without a cache where it has one."""
    parameters = inspect.signature(model.forward).parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    with torch.no_grad():
        return model(**inputs, **extra)
