"""Loading a transformers model for capture: the only file besides the checkpoint writer that imports transformers.

The model is built without weights (parameters on meta, buffers computed), attention goes through our own function of
transformers' attention interface, and tensors are read lazily from the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.diagnostics import ArtifactError, CaptureError
from graphopt.frontend.checkpoint import CheckpointSource
from graphopt.frontend.converted import Conversion, ConvertedSource
from graphopt.frontend.empty import fake_parameters, parameters_on_meta
from graphopt.frontend.export import DEFAULT_DIMS, capture_module
from graphopt.frontend.signature import DECODED, dims_of, model_inputs, with_pictures
from graphopt.ir.follow import Lost
from graphopt.ir.pictures import PICTURES, let_vary, splices
from graphopt.ir.program import Dim, Origin, Program
from graphopt.ir.weights import MemorySource

_PROBE_ROW = 1 << 17


def capture_pretrained(path: str | Path, *, dims: tuple[Dim, ...] = DEFAULT_DIMS) -> Program:
    """Capture a local checkpoint directory, or a hub id that transformers has cached.

    Raises ArtifactError when files are missing or damaged, CaptureError when the model cannot be captured.
    """
    from transformers import AutoConfig

    directory = _resolve(path)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ArtifactError.of("no_config", f"{directory} holds no config.json")
    try:
        raw = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise ArtifactError.of("bad_config", f"{config_file} is not JSON: {error}") from error
    raw.pop("auto_map", None)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    source = CheckpointSource(directory)
    if source.scaled:
        # What is read is the product with the scales, so that neither the graph nor what is saved is quantised.
        raw.pop("quantization_config", None)
    dtype = config.dtype or torch.float32
    return _capture(config, raw, dtype, source, Origin(directory.name, raw, None, str(directory)), dims)


def capture_config(config: Any, *, dtype: torch.dtype | None = None, dims: tuple[Dim, ...] = DEFAULT_DIMS) -> Program:
    """Capture a transformers config for its shapes alone: a Program whose weights cannot be read.

    Serves planning, cost and golden counts of models that are not on this machine.
    """
    raw = config.to_dict()
    dtype = dtype or config.dtype or torch.bfloat16
    return _capture(config, raw, dtype, None, Origin(config.model_type, raw), dims)


def _without_cache(config: Any) -> None:
    config.use_cache = False
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "sub_configs"):
            _without_cache(part)


def _build(factory: Any, config: Any, dtype: torch.dtype) -> Any:
    """Build with our attention function; classes that keep their own attention table get sdpa, else eager.

    Their attention is raised from the graph instead, so the choice changes how much is raised and never what runs.
    """
    if hasattr(config, "_experts_implementation"):
        # One product over gathered experts: the plainest graph, with no data-dependent shapes.
        config._experts_implementation = "batched_mm"
    refused: list[str] = []
    for implementation in ("graphopt", "graphopt_additive", "sdpa", "eager"):
        try:
            model = factory(config, dtype=dtype, attn_implementation=implementation)
        except (KeyError, ValueError, ImportError) as error:
            refused.append(f"{implementation}: {error}")
            continue
        # Code that spells its attention out would take our mask, which is true where a key is seen, for an addend.
        if implementation.startswith("graphopt") and not _calls_attention_interface(model):
            refused.append(f"{implementation}: the model's code does not call transformers' attention interface")
        elif implementation == "graphopt" and not _takes_masks_of_truth(model):
            refused.append(f"{implementation}: the model's code computes with additive masks")
        else:
            return model
    raise CaptureError.of("not_buildable", f"{type(config).__name__} cannot be built", notes=tuple(refused))


def _takes_masks_of_truth(model: torch.nn.Module) -> bool:
    """Whether every part supports masks as sdpa has them; others may add to a mask or extend it by numbers."""
    return all(getattr(module, "_supports_sdpa", True) for module in model.modules())


def _calls_attention_interface(model: torch.nn.Module) -> bool:
    homes = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules[home], "ALL_ATTENTION_FUNCTIONS") for home in homes)


def capture_model(model: Any, *, dims: tuple[Dim, ...] = DEFAULT_DIMS) -> Program:
    """Capture a transformers model that is in memory; the model itself is neither changed nor copied.

    Raises CaptureError for a module that is no transformers model: such a module needs `inputs`.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "save_pretrained"):
        raise CaptureError.of(
            "inputs_unknown",
            f"{type(model).__name__} is no transformers model, so its inputs are not known",
            help=("pass inputs=(Input(name, shape, dtype), ...)",),
        )
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    clone = type(config).from_dict(config.to_dict())
    clone.architectures = [type(model).__name__]
    empty, _ = build_without_weights(clone, dtype)
    tensors = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: b.detach() for name, b in model.named_buffers()}
    origin = Origin(type(model).__name__, config.to_dict(), type(model).__name__, None)
    return _captured(empty, dims, source=MemorySource({**tensors, **buffers}), constants=buffers, origin=origin)


def directory_of(model: Any) -> Path | None:
    """The local directory that a transformers model was read from, for the tokenizer beside its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = getattr(model, "name_or_path", None)
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, allow_patterns=["tokenizer.json"], local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None


def _captured(model: torch.nn.Module, dims: tuple[Dim, ...], **options: Any) -> Program:
    """The program of a model without weights: with pictures where it takes them beside tokens, else of its tokens.

    Some models cannot be captured with a varying number of pictures. Theirs is the program of the text alone.
    """
    inputs = model_inputs(model)
    fixed = PICTURES.hint + 3
    both = with_pictures(model, inputs, fixed)
    with our_masks(packed=any(spec.role == "positions" for spec in inputs)):
        if both is not None:
            name = next(spec.name for spec in both if spec.role == "pictures")
            try:
                program = let_vary(capture_module(model, both, dims=dims_of(both, dims), **options), name)
                if splices(program):
                    return program
            except (CaptureError, Lost, RuntimeError, ValueError):
                pass
        try:
            return capture_module(model, inputs, dims=dims_of(inputs, dims), **options)
        except CaptureError:
            # A class without a head over tokens may make its decoder's tokens from the encoder's, and mix up theirs and ours.
            own = tuple(spec for spec in inputs if spec.name != DECODED)
            if len(own) == len(inputs) or model.get_output_embeddings() is not None:  # type: ignore[operator]
                raise
            return capture_module(model, own, dims=dims_of(own, dims), **options)


def build_without_weights(config: Any, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model of a config without weights: fake CPU parameters that take no memory, and its real buffers.

    Fake CPU tensors instead of meta ones keep the values of constants that `forward` makes, and take the branches that
    a model chooses for a real device.
    """
    import transformers

    name = (config.architectures or [None])[0]
    cls = getattr(transformers, name, None) if name else None
    factory = cls._from_config if cls is not None else transformers.AutoModelForCausalLM.from_config
    _register_attention()
    # Gradient checkpointing and caches change the graph; capture is stateless by design.
    _without_cache(config)
    with parameters_on_meta():
        model = _build(factory, config, dtype)
    model.eval()
    fake_parameters(model)
    return model, dict(model.named_buffers())


def _capture(
    config: Any,
    raw: dict[str, Any],
    dtype: torch.dtype,
    source: CheckpointSource | None,
    origin: Origin,
    dims: tuple[Dim, ...],
) -> Program:
    model, buffers = build_without_weights(config, dtype)
    if source is not None:
        source = _as_the_model_names(source, model)
        _compute_what_is_not_saved(model, frozenset(source.names))
        buffers = dict(model.named_buffers())
    on_disk = frozenset(source.names) if source is not None else None
    origin = Origin(origin.name, raw, type(model).__name__, origin.path)
    program = _captured(model, dims, source=source, constants=buffers, origin=origin, names_on_disk=on_disk)
    return program if source is None else source.fit(program, "config.json makes it")


def _compute_what_is_not_saved(model: Any, on_disk: frozenset[str]) -> None:
    """Turn parameters that a class computes instead of saving them (sinusoidal positions) into constant buffers."""
    patterns = list(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for name, parameter in list(model.named_parameters()):
        if name in on_disk or name not in patterns:
            continue
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        made = []
        for seed in (0, 1):
            twin = copy.copy(module)
            twin._parameters = {own: torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), False)}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                model._init_weights(twin)
            made.append(twin._parameters[own].detach())
        if torch.equal(*made) and bool(torch.isfinite(made[0]).all()):
            del module._parameters[own]
            module.register_buffer(own, made[0], persistent=False)


def _as_the_model_names(source: CheckpointSource, model: Any) -> CheckpointSource:
    """The checkpoint under the model's own names: transformers' renamings and conversions, done lazily.

    Raises ArtifactError when tensors on disk do not convert into those of the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state = model.state_dict()
    if set(state) <= set(source.names):
        return source
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    renamed: dict[str, str] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    prefix = model.base_model_prefix
    for name in sorted(source.names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        if pattern is None:
            renamed[target] = name
        else:
            groups.setdefault(target, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(name)

    def conversion(first: str, converter: Any, parts: dict[str, list[str]]) -> Conversion:
        def make(tensors: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
            ready = copy.deepcopy(converter)
            for kind, values in tensors.items():
                for value in values:
                    ready.add_tensor(first, kind, kind, lambda value=value: value)
            made = ready.convert(first, model=model, config=model.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

        merge, *rest = converter.operations
        stacks = isinstance(merge, MergeModulelist) and merge.dim == 0
        stacks = stacks and all(getattr(operation, "dim", 0) > 0 for operation in rest)
        return Conversion({kind: tuple(names) for kind, names in parts.items()}, make, stacks)

    try:
        return ConvertedSource(source, renamed, tuple(conversion(t, *group) for t, group in groups.items()))
    except (RuntimeError, ValueError) as error:
        raise ArtifactError.of(
            "tensors_not_converted",
            f"{source.directory} holds tensors that do not convert into those of {type(model).__name__}: {error}",
        ) from error


def _resolve(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.is_file():
        ways = (f"if it is a spec, make its model first: graphopt run {path} --out DIR",)
        raise ArtifactError.of("no_model", f"{str(path)!r} is a file, not a model's directory", help=ways)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if directory.is_absolute() or str(path).startswith("."):
        raise ArtifactError.of("no_model", f"there is no model directory {str(path)!r}")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError.of(
            "no_model",
            f"{str(path)!r} is neither a directory nor a model that can be fetched",
            notes=(str(error).splitlines()[0],),
        ) from error


@contextlib.contextmanager
def our_masks(packed: bool) -> Iterator[None]:
    """While a model is exported, masks of the sdpa and eager implementations come from `graphopt::attention_mask` too.

    Texts that are `packed` in one row are told apart by their positions, as far as these are given: positions that a
    model counts itself go on from token to token.
    """
    from transformers import AttentionMaskInterface, masking_utils

    indices = masking_utils.find_packed_sequence_indices
    mapping = AttentionMaskInterface._global_mapping
    before = {name: mapping[name] for name in ("sdpa", "eager") if name in mapping}
    AttentionMaskInterface.register("sdpa", _mask)
    AttentionMaskInterface.register("eager", _spelled_mask)
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = indices
        for name, function in before.items():
            AttentionMaskInterface.register(name, function)


def _eager_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor | None:
    """The additive form of `_mask`, for attention that adds its mask to the scores."""
    mask = _mask(*args, dtype=dtype, **kwargs)
    if mask is None:
        return None
    low = torch.tensor(torch.finfo(dtype).min, device=mask.device, dtype=dtype)
    return torch.where(mask, torch.tensor(0.0, device=mask.device, dtype=dtype), low)


def _spelled_mask(batch_size: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The same with a row for each sequence, as some code demands that spells its attention out."""
    mask = _eager_mask(batch_size, *args, **kwargs)
    return mask if mask is None else mask.expand(batch_size, -1, -1, -1)


def _register_attention() -> None:
    """Offer `graphopt` beside transformers' own attention functions; nothing of theirs is replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("graphopt", _attention)
    AttentionMaskInterface.register("graphopt", _mask)
    AttentionInterface.register("graphopt_additive", _attention)
    AttentionMaskInterface.register("graphopt_additive", _eager_mask)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `graphopt::attention`: returns `[B, S, H, D]`."""
    own = _spelled_attention(module, kwargs)
    if own is not None:
        low = torch.tensor(torch.finfo(query.dtype).min, dtype=query.dtype)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, torch.tensor(0.0, dtype=query.dtype), low)
        given = {"dropout": dropout, "is_causal": is_causal, "softcap": softcap, "s_aux": s_aux}
        given |= {"scaling": scaling, "position_bias": position_bias}
        given = {name: value for name, value in given.items() if value is not None}
        return own(module, query, key, value, attention_mask, **given, **kwargs)  # type: ignore[no-any-return]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and attention_mask is None
    if position_bias is not None:
        low = torch.finfo(query.dtype).min
        bias = position_bias.to(query.dtype)
        if attention_mask is None:
            attention_mask = bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = bias.masked_fill(~attention_mask, low)
        else:
            attention_mask = bias + attention_mask
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    result = torch.ops.graphopt.attention.default(
        query, key, value, attention_mask, s_aux, scale, causal, None, None if softcap is None else float(softcap)
    )
    return result.transpose(1, 2).contiguous(), None


def _spelled_attention(module: torch.nn.Module, given: dict[str, Any]) -> Any:
    """The attention that a model's code spells out, where it is given a tensor that it reads and we do not know."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    tensors = {name for name, value in given.items() if isinstance(value, torch.Tensor)}
    return own if own is not None and tensors & set(inspect.signature(own).parameters) else None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: causal and windowed masks become one op with attributes, others a tensor."""
    found = _classify(mask_function)
    if found is None:
        from transformers.masking_utils import sdpa_mask

        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False}
        kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "config")}
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **kwargs
        )
    causal, window = found
    if attention_mask is None and not causal and window is None:
        return None
    anchor = attention_mask if attention_mask is not None else torch.zeros((), device=device)
    return torch.ops.graphopt.attention_mask.default(anchor, attention_mask, q_length, kv_length, causal, window)


def _classify(mask_function: Any) -> tuple[bool, int | None] | None:
    """Tell (causal, window) of a mask function by evaluating it on index grids, or None for any other kind.

    transformers passes masks as functions of (batch, head, query, key) indices; asking the function itself needs no list
    of the functions that exist.
    """
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    zero = None

    def row(query: int, keys: torch.Tensor) -> torch.Tensor:
        seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys))
        if isinstance(seen, FakeTensor):
            raise TypeError("the mask depends on traced values")
        return seen.expand(keys.shape)

    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        # One axis, since a traced table that is indexed by a number would ask for that number's value.
        zero = torch.zeros(1, dtype=torch.int64)
        try:
            keys = torch.arange(2 * _PROBE_ROW)
            far = row(_PROBE_ROW, keys)
            past, future = int(far[: _PROBE_ROW + 1].sum()), int(far[_PROBE_ROW + 1 :].sum())
            causal = future == 0
            window = None if past == _PROBE_ROW + 1 else past
            if window is None and not causal and future != _PROBE_ROW - 1:
                return None
            queries = {0, 1, 2, 31, _PROBE_ROW}
            if window is not None:
                queries |= {max(window - 1, 0), window, window + 1, 2 * window + 3}
            for query in queries:
                expected = (keys <= query) if causal else torch.ones_like(keys, dtype=torch.bool)
                if window is not None:
                    expected = expected & (keys > query - window)
                    if not causal:
                        expected = expected & (keys < query + window)
                if not torch.equal(row(query, keys), expected):
                    return None
        except (RuntimeError, TypeError, IndexError, AttributeError):
            # Functions that close over traced tensors (packed sequences, image blocks) are no pure index functions.
            return None
    return causal, window
