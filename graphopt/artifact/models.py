"""The model class of graphopt checkpoints: a graph under transformers' own loading and generate()."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from graphopt.artifact.config import GraphoptConfig
from graphopt.artifact.decoding import Decoding, Pack, PastKeyValues
from graphopt.artifact.native import parse_graph, recast, write_graph_files
from graphopt.artifact.native_names import CONSTANTS_FILE, GRAPH_FILE, TRAIL_FILE
from graphopt.artifact.trail import trail_from_json, trail_to_json
from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.run import bind_inputs, fastest
from graphopt.ops.library import attention, scaled_attention

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_WRITTEN = "decoder_input_ids"
"""transformers' name of the text that is written, where there is another one"""
_ROLES = {"tokens": "input_ids", "padding": "attention_mask", "positions": "position_ids"}


class GraphoptForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model whose forward runs graph.txt; parameters have their checkpoint names, ties are one parameter.

    A graph with a cache (insert_cache) decodes with it; with any other, generate() runs the whole sequence again for
    every token. Of a graph that writes a text about another one, inputs have their own names.
    """

    config_class = GraphoptConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: GraphoptConfig, program: Program | None = None) -> None:
        super().__init__(config)
        if program is None:
            raise ArtifactError.of(
                "no_graph",
                "a graphopt model is built from the graph in its checkpoint, and a config alone has none",
                help=("use from_pretrained on the checkpoint directory",),
            )
        self._program = program
        self._graphs: dict[tuple[torch.dtype, torch.device], Any] = {}
        self._constants: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._read = tuple(program.weight_nodes)
        for name, weight in program.weights.weights.items():
            if weight.kind != "constant":
                _register(self, name, weight.expr.shape, _wanted(weight.expr.dtype, program, config), weight.kind)
        self._decoding = Decoding(program) if program.cached else None
        roles = ("tokens", "padding", "values")
        names = [spec.name for spec in program.entry.inputs if spec.role in roles and spec.name != _WRITTEN]
        self._context = names if any(spec.name == _WRITTEN for spec in program.entry.inputs) else []
        self.generation_config.use_cache = self._decoding is not None
        self.post_init()

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a graphopt checkpoint; takes what transformers' from_pretrained takes.

        Raises ArtifactError when the graph is missing or not acceptable, or tensors that it reads are missing.
        """
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        config = config if config is not None else GraphoptConfig.from_pretrained(path, **hub)
        with torch.device("cpu"):
            program = _fetch_program(path, hub)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            path, *args, config=config, program=program, output_loading_info=True, **kwargs
        )
        lost = sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"]))
        if lost:
            raise ArtifactError.of("missing_tensors", f"{path} lacks {len(lost)} tensors, the first {lost[0]!r}")
        model._prepare()
        return (model, info) if wants_info else model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Make what a run in the present dtype on the present device takes: torch.compile cannot trace its making."""
        device = self.device
        if device.type != "meta":
            self._graph(device)
            for name in self._read:
                self._value(name, device)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the checkpoint with its graph; round-trips through from_pretrained."""
        super().save_pretrained(save_directory, **kwargs)
        program = self._program if self.dtype == self._program.dtype else recast(self._program, self.dtype)
        write_graph_files(program, Path(save_directory))
        (Path(save_directory) / TRAIL_FILE).write_text(trail_to_json(program.trail))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: PastKeyValues | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S, V]` from tokens `[B, S]`; with `labels` `[B, S]` the shifted cross entropy (-100 is ignored).

        Raises TypeError when an input that the graph needs is missing, ValueError for what the graph cannot give.
        """
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not possible: the graph maps tokens to logits")
        if past_key_values is not None:
            if self._decoding is None or not isinstance(past_key_values, PastKeyValues):
                raise ValueError("past_key_values is not possible: the graph has no cache, or not one of this kind")
            if input_ids is None:
                raise TypeError("input_ids are missing")
            decoder = self._decoding.decoder(self, self.dtype, self.device)
            logits = self._decoding.step(past_key_values, decoder, input_ids, attention_mask)
        else:
            named = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
            extra = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
            about = kwargs.get("about")
            if isinstance(about, _About):
                extra |= {**about.rows(len(input_ids)), _WRITTEN: input_ids}  # type: ignore[arg-type]
            results = self._run(named | extra)
            logits = results["logits"] if "logits" in results else next(iter(results.values()))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: PastKeyValues | None = None,
        about: _About | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the cache does not hold yet; without one the whole sequence, with positions that do not count padding."""
        if past_key_values is not None:
            new = input_ids[:, past_key_values.seen :]
            return {"input_ids": new, "attention_mask": attention_mask, "past_key_values": past_key_values}
        if about is not None:
            return {"input_ids": input_ids, "about": about}
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give generate() an empty cache of ours, unless it is told to go without."""
        if self._decoding is None or generation_config.use_cache is False or model_kwargs.get("past_key_values"):
            return
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch_size
        decoder = self._decoding.decoder(self, self.dtype, self.device)
        about = model_kwargs.get("about")
        given = {} if about is None else about.rows(rows)
        model_kwargs["past_key_values"] = PastKeyValues(decoder.cache(rows, max_cache_length + 1, **given))

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' generate(), which see; of a graph with another text the one that is written about it.

        Raises TypeError when that other text is missing, or nothing says which token begins.
        """
        if not self._context:
            return super().generate(inputs, *args, **kwargs)
        given = {name: kwargs.pop(name) for name in self._context if kwargs.get(name) is not None}
        if inputs is not None:
            given[self._context[0]] = inputs
        if self._context[0] not in given:
            raise TypeError(f"{self._context[0]} is missing: the text is written about it")
        first = given[self._context[0]]
        if "attention_mask" in self._context and "attention_mask" not in given:
            given["attention_mask"] = torch.ones_like(first)
        written = kwargs.pop(_WRITTEN, None)
        if written is None:
            start = kwargs.pop("decoder_start_token_id", self.generation_config.decoder_start_token_id)
            start = (self.config.source_config or {}).get("decoder_start_token_id") if start is None else start
            if start is None:
                raise TypeError("decoder_start_token_id is missing, and the checkpoint names none")
            written = torch.full((len(first), 1), start, dtype=torch.long, device=first.device)
        mask = torch.ones_like(written)
        return super().generate(written, *args, attention_mask=mask, about=_About(given), **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every tensor comes from the checkpoint, and loading refuses when one is missing."""

    def _run(self, named: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        program, device = self._program, self.device
        pack = None
        if self._decoding is not None and named["input_ids"] is not None and not self._context:
            pack = Pack(named["attention_mask"], named["input_ids"])
            named = named | {"input_ids": pack.pack(named["input_ids"]), "attention_mask": None, "position_ids": None}
        given: dict[str, torch.Tensor] = {}
        for spec in program.entry.inputs:
            value = named.get(spec.name if self._context else _ROLES.get(spec.role, spec.name))
            if value is not None:
                given[spec.name] = value.to(spec.dtype)
        mask = named["attention_mask"]
        hides = "attention_mask" in self._context or any(spec.role == "padding" for spec in program.entry.inputs)
        if mask is not None and not hides and not mask.all():
            raise ValueError("this model's graph takes no attention mask, so padding cannot be hidden from it")
        inputs = bind_inputs(program, given, device, self.dtype)
        values = [self._value(name, device) for name in self._read]
        results = self._graph(device)(*values, *inputs)
        if pack is not None:
            results = [pack.unpack(result) if result.dim() == 3 else result for result in results]
        return dict(zip(program.entry.outputs, results, strict=True))

    def _graph(self, device: torch.device) -> Any:
        key = (self.dtype, device)
        if key not in self._graphs:
            self._graphs[key] = graph = fastest(self._program, self.dtype, device)
            for node in graph.graph.nodes:
                # Compilers see through it, and need not trust what the op says of its result's layout.
                if node.target is attention:
                    node.target = scaled_attention
            graph.recompile()
        return self._graphs[key]

    def _value(self, name: str, device: torch.device) -> torch.Tensor:
        if self._program.weights[name].kind != "constant":
            value: torch.Tensor = _find(self, name)
            return value
        key = (name, device)
        if key not in self._constants:
            self._constants[key] = self._program.weights.evaluate(name, device=device)
        return self._constants[key]


class _About:
    """Another text, of which generate() repeats nothing itself: a row for each of its beams is made when it is read."""

    def __init__(self, given: dict[str, torch.Tensor]) -> None:
        self.given = given

    def rows(self, count: int) -> dict[str, torch.Tensor]:
        """The inputs for `count` rows, those of one text side by side."""
        return {name: value.repeat_interleave(count // len(value), 0) for name, value in self.given.items()}


def _wanted(dtype: torch.dtype, program: Program, config: GraphoptConfig) -> torch.dtype:
    """A weight's dtype when the model is loaded in `config.dtype`: what had the program's dtype follows it."""
    target = config.dtype
    return target if isinstance(target, torch.dtype) and dtype == program.dtype else dtype


def _register(root: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    *path, last = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    value = torch.empty(shape, dtype=dtype)
    if kind == "buffer":
        module.register_buffer(last, value)
    else:
        module.register_parameter(last, nn.Parameter(value, requires_grad=dtype.is_floating_point))


def _find(root: nn.Module, name: str) -> Any:
    module: Any = root
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _fetch_program(path: Any, hub: dict[str, Any]) -> Program:
    graph = cached_file(path, GRAPH_FILE, _raise_exceptions_for_missing_entries=False, **hub)
    if graph is None:
        raise ArtifactError.of("no_graph", f"{path} holds no {GRAPH_FILE}, so it is no graphopt checkpoint")
    optional = {
        name: cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub)
        for name in (CONSTANTS_FILE, TRAIL_FILE)
    }
    program = parse_graph(Path(graph), None)
    trail = optional[TRAIL_FILE]
    return program if trail is None else replace(program, trail=trail_from_json(Path(trail).read_text(), trail))


def register_models() -> None:
    """Make transformers' classes of language models return GraphoptForCausalLM for graphopt checkpoints."""
    AutoModel.register(GraphoptConfig, GraphoptForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(GraphoptConfig, GraphoptForCausalLM, exist_ok=True)
    AutoModelForSeq2SeqLM.register(GraphoptConfig, GraphoptForCausalLM, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(GraphoptConfig, GraphoptForCausalLM, exist_ok=True)
