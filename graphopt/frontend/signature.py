"""The inputs that a transformers model is captured with, from the signature of its forward and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from graphopt.diagnostics import CaptureError
from graphopt.ir.program import Dim, Input

DECODER = Dim("T", 1, 1 << 20, 13)
_IMAGE = 224
_PICTURES = "pixel_values"
_SAMPLES = "input_values"
DECODED = "decoder_input_ids"
SOUND = 4003


def model_inputs(model: Any) -> tuple[Input, ...]:
    """Inputs in the order of the signature: tokens with their padding and positions, images, sound, series, prompts.

    Batch and sequence lengths are symbolic; the sizes of images, sound features and series are those of the config.
    Raises CaptureError when the signature has none of them.
    """
    parameters = inspect.signature(model.forward).parameters
    inputs: list[Input] = []
    if "input_ids" in parameters:
        inputs.append(Input("input_ids", ("B", "S"), torch.int64, "tokens"))
        if "attention_mask" in parameters:
            inputs.append(Input("attention_mask", ("B", "S"), torch.int64, "padding"))
        if "position_ids" in parameters:
            inputs.append(Input("position_ids", ("B", "S"), torch.int64, "positions"))
        if _PICTURES in parameters and parameters[_PICTURES].default is inspect.Parameter.empty:
            inputs.append(Input(_PICTURES, ("B", *_image(model)), torch.float32))
    else:
        for name, shape in _VALUES.items():
            if name in parameters and (found := shape(model)) is not None:
                inputs.append(Input(name, ("B", *found), torch.float32))
    if inputs and DECODED in parameters and getattr(model.config, "is_encoder_decoder", False):
        inputs.append(Input(DECODED, ("B", DECODER.name), torch.int64, "tokens"))
    if not inputs:
        raise CaptureError.of(
            "inputs_unknown",
            f"{type(model).__name__} takes {', '.join(parameters)}; pass inputs=... to capture it as a module",
        )
    order = list(parameters)
    return tuple(sorted(inputs, key=lambda spec: order.index(spec.name)))


def with_pictures(model: Any, inputs: tuple[Input, ...], count: int) -> tuple[Input, ...] | None:
    """The inputs and so many pictures beside the tokens, for a model that takes both; None for any other."""
    parameters = list(inspect.signature(model.forward).parameters)
    tokens = any(spec.role == "tokens" for spec in inputs)
    sized = any(isinstance(getattr(config, "image_size", None), int | list | tuple) for config in _configs(model))
    given = any(spec.name == _PICTURES for spec in inputs)
    if not tokens or given or _PICTURES not in parameters or not sized:
        return None
    made = (*inputs, Input(_PICTURES, (count, *_image(model)), torch.float32, "pictures"))
    return tuple(sorted(made, key=lambda spec: parameters.index(spec.name)))


def dims_of(inputs: tuple[Input, ...], dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The dimensions that the inputs have: those given, and the decoder's length where one is read.

    Samples of sound are captured at a length that layers of strided convolutions leave some of.
    """
    used = {size for spec in inputs for size in spec.shape}
    sound = {size for spec in inputs if spec.name == _SAMPLES for size in spec.shape[1:]}
    kept = tuple(
        replace(dim, hint=max(dim.hint, SOUND)) if dim.name in sound and dim.low < dim.high else dim
        for dim in dims
        if dim.name in used
    )
    return (*kept, DECODER) if DECODER.name in used and DECODER.name not in {d.name for d in dims} else kept


def _configs(model: Any) -> Iterator[Any]:
    """The model's config, then its parts'."""
    waiting = [model.config]
    while waiting:
        config = waiting.pop(0)
        yield config
        waiting += [p for name in config.sub_configs if (p := getattr(config, name, None)) is not None]


def _size(model: Any, *names: str) -> int | None:
    """The first whole number that a config holds under one of the names, the model's own config first."""
    for config in _configs(model):
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _image(model: Any) -> tuple[str | int, ...]:
    channels = _size(model, "num_channels", "in_channels", "in_chans") or 3
    for config in _configs(model):
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            return (channels, size, size)
        if isinstance(size, list | tuple) and len(size) == 2:
            return (channels, int(size[0]), int(size[1]))
    return (channels, _IMAGE, _IMAGE)


def _features(model: Any) -> tuple[str | int, ...] | None:
    """Mel features: `[bins, frames]` where the config bounds the frames (two of them a position), else `[frames, bins]`."""
    positions, bins = _size(model, "max_source_positions"), _size(model, "num_mel_bins")
    per_channel = _size(model, "input_feat_per_channel")
    if per_channel is not None:
        return ("S", per_channel * (_size(model, "input_channels") or 1))
    return None if bins is None else (bins, 2 * positions) if positions is not None else ("S", bins)


def _series(model: Any) -> tuple[str | int, ...] | None:
    length = _size(model, "context_length")
    channels = _size(model, "num_input_channels", "input_size")
    return None if length is None else (length, channels) if channels is not None else (length,)


_VALUES: dict[str, Callable[[Any], tuple[str | int, ...] | None]] = {
    _PICTURES: _image,
    "input_features": _features,
    _SAMPLES: lambda model: ("S",),
    "past_values": _series,
    "input_points": lambda model: (1, 2, 2),
}
