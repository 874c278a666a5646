"""The graphopt format: config.json, the graph as text, its constants, and weights under their checkpoint names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import graphopt
from graphopt.artifact.journal import digest
from graphopt.artifact.native_names import CONSTANTS_FILE, GRAPH_FILE, MODEL_TYPE
from graphopt.artifact.tensors import Entry, write_file
from graphopt.diagnostics import ArtifactError
from graphopt.frontend.checkpoint import CheckpointSource
from graphopt.frontend.normalize import drop_no_ops
from graphopt.ir.program import Origin, Program
from graphopt.ir.run import specialised
from graphopt.ir.shapes import propagate
from graphopt.ir.text import parse_program, print_program
from graphopt.ir.weights import Expr, TensorSource, Weight, sources

# Facts that generate() and the loaders of tokenizers read from a config; the graph itself needs none of them.
_PASSED_ON = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@dataclass(frozen=True, eq=False)
class Cast(Expr):
    """An expression stored in another dtype."""

    part: Expr
    kind: torch.dtype

    def parts(self) -> tuple[Expr, ...]:
        """The expression before rounding."""
        return (self.part,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the result."""
        return self.part.shape

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the result."""
        return self.kind

    def rows(self, start: int, stop: int) -> Expr | None:
        """The same of fewer rows."""
        part = self.part.rows(start, stop)
        return None if part is None else Cast(part, self.kind)

    def compute(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The value; the store rounds it."""
        return parts[0]

    def describe(self) -> str:
        """The dtype."""
        return f"{self.part.describe()} as {str(self.kind).removeprefix('torch.')}"


def recast(program: Program, dtype: torch.dtype) -> Program:
    """The program with floating weights stored in `dtype` and its graph computing in it.

    Raises ArtifactError when the graph has no meaning in that dtype.
    """

    def cast(weight: Weight) -> Weight:
        keep = weight.kind == "constant" or not weight.expr.dtype.is_floating_point
        return weight if keep or weight.expr.dtype == dtype else replace(weight, expr=Cast(weight.expr, dtype))

    weights = replace(program.weights, weights={name: cast(w) for name, w in program.weights.weights.items()})
    graph = specialised(program, dtype, "cpu")
    try:
        propagate(graph, weights, program.dims, program.entry)
        drop_no_ops(graph.graph)
        graph.recompile()
        propagate(graph, weights, program.dims, program.entry)
    except RuntimeError as error:
        raise ArtifactError.of(
            "dtype_not_possible",
            f"the graph cannot compute in {dtype}: {str(error).splitlines()[0]}",
            help=(f"save in {program.dtype}",),
        ) from error
    return replace(program, graph=graph, weights=weights, dtype=dtype)


def weight_entries(program: Program) -> dict[str, Entry]:
    """What model.safetensors holds: parameters and saved buffers, one tensor an alias group."""
    return {name: _entry(program, name) for name, w in program.weights.weights.items() if w.kind != "constant"}


def entry(program: Program, name: str, dtype: torch.dtype) -> Entry:
    """A weight to write, rounded to `dtype` last."""
    return replace(_entry(program, name), dtype=dtype)


def _entry(program: Program, name: str, *, finite: bool = True) -> Entry:
    store = program.weights
    expr = store[name].expr
    names = sources(expr)
    shared: frozenset[str] = getattr(store.source, "shared", frozenset())
    return Entry(
        expr.shape,
        expr.dtype,
        lambda: store.evaluate(name),
        finite,
        # What several weights are made of is read whole, once.
        None if shared.intersection(names) else lambda size: store.pieces(name, size),
        lambda: digest(store, expr),
    )


def write_graph(program: Program, directory: Path) -> None:
    """Write config.json, graph.txt and constants.safetensors.

    Raises ArtifactError when the graph has no text form.
    """
    write_graph_files(program, directory)
    (directory / "config.json").write_text(json.dumps(config_of(program), indent=2, sort_keys=True) + "\n")


def write_graph_files(program: Program, directory: Path) -> None:
    """Write graph.txt and constants.safetensors.

    Raises ArtifactError when the graph has no text form.
    """
    (directory / GRAPH_FILE).write_text(print_program(program))
    constants = {
        name: _entry(program, name, finite=False) for name, w in program.weights.weights.items() if w.kind == "constant"
    }
    if constants:
        write_file(directory / CONSTANTS_FILE, constants)


def token_ids(program: Program) -> dict[str, Any]:
    """Special token ids of the source config."""
    source = program.origin.config or {}
    return {key: source.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def config_of(program: Program) -> dict[str, Any]:
    """The config.json of a graphopt checkpoint."""
    source = program.origin.config or {}
    cores = (torch.ops.graphopt.attention.default, torch.ops.graphopt.cached_attention.default)
    attentions = [node for node in program.graph.graph.nodes if node.target in cores]
    config: dict[str, Any] = {key: source.get(key) for key in _PASSED_ON if source.get(key) is not None}
    config |= {
        "model_type": MODEL_TYPE,
        "architectures": ["GraphoptForCausalLM"],
        "graphopt_version": graphopt.__version__,
        "dtype": str(program.dtype).removeprefix("torch."),
        "is_encoder_decoder": False,
        "use_cache": program.cached,
        "tie_word_embeddings": False,
        "num_hidden_layers": len(attentions),
        "vocab_size": int(program.output_nodes[0].meta["val"].shape[-1]),
        "hidden_size": _width(program),
        "source_config": dict(source),
        "source_name": program.origin.name,
        "source_architecture": program.origin.architecture,
    }
    if attentions:
        config["num_attention_heads"] = max(int(node.args[0].meta["val"].shape[1]) for node in attentions)
    return config


def _width(program: Program) -> int:
    """The width of the residual stream: of what enters the head, or of the result when there is none."""
    node = program.output_nodes[0]
    inner = node.args[0] if node.target is torch.ops.aten.linear.default else node
    return int(inner.meta["val"].shape[-1])


def read_program(directory: Path, config: Mapping[str, Any], *, weights: bool = True) -> Program:
    """The program of a graphopt checkpoint; without `weights` it cannot be evaluated.

    Raises ArtifactError when files are missing or damaged, or the graph and the tensors disagree.
    """
    source = CheckpointSource(directory) if weights else None
    program = parse_graph(directory / GRAPH_FILE, source)
    origin = Origin(
        str(config.get("source_name") or directory.name),
        config.get("source_config") or None,
        config.get("source_architecture"),
        str(directory),
    )
    program = replace(program, origin=origin)
    return program if source is None else source.fit(program, "the graph reads")


def parse_graph(path: Path, source: TensorSource | None) -> Program:
    """Parse a graph file with the constants beside it."""
    constants_file = path.parent / CONSTANTS_FILE
    try:
        text = path.read_text(encoding="utf-8")
        constants = load_file(constants_file) if constants_file.is_file() else {}
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise ArtifactError.of("unreadable_graph", f"cannot read the graph in {path.parent}: {error}") from error
    return parse_program(text, constants, source, str(path))
