"""Finding the stock transformers config that says what a program is, and proving it by the graph.

There is no table per architecture: a config is proposed from sizes that the program's graph shows, its model is
captured as any model is, and the two graphs are matched. What differs proposes the next config; no difference is proof.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.artifact.match import Match, match
from graphopt.artifact.relatives import relatives
from graphopt.diagnostics import ArtifactError, GraphoptError
from graphopt.ir.pictures import splices
from graphopt.ir.program import Program

MOST_CAPTURES = 14
_SIZE_ATTRIBUTE = re.compile(r"size|dim|inner|width|ffn")
Values = dict[str, Any]


@dataclass(frozen=True)
class Stock:
    """A stock config with the model's weights bound to it: stock name -> program weight (None: zeros), with shapes."""

    config: Any
    binding: Mapping[str, str | None]
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class _Search:
    program: Program
    raw: Mapping[str, Any]
    captures: dict[str, Program | str] = field(default_factory=dict)


def find_stock(program: Program) -> Stock | tuple[str, ...]:
    """The stock form of a program, or the reasons why it has none, the first one the nearest miss."""
    raw = program.origin.config
    if raw is None or not isinstance(raw.get("model_type"), str):
        return ("the program was not captured from a transformers config",)
    found = _find(program, raw)
    if isinstance(found, Stock):
        return found
    for other in relatives(program, raw):
        related = _find(program, other)
        if isinstance(related, Stock):
            return related
    return found


def _find(program: Program, raw: Mapping[str, Any]) -> Stock | tuple[str, ...]:
    search = _Search(program, raw)
    try:
        first = _first_guess(search)
    except _Uneven as uneven:
        return (str(uneven),)
    return _climb(search, first)


class _Uneven(Exception):
    """The program differs from layer to layer, or no config attribute says what it needs."""


def _climb(search: _Search, values: Values) -> Stock | tuple[str, ...]:
    """Follow the differences from one config to the next while they become fewer."""
    tried: set[str] = set()
    best, best_values, reasons = _attempt(search, values), values, []
    if isinstance(best, str):
        return (best,)
    tried.add(_key(values))
    while not best.proved:
        improved = False
        for candidate in _neighbours(search, best_values, best):
            if _key(candidate) in tried or len(search.captures) >= MOST_CAPTURES:
                continue
            tried.add(_key(candidate))
            found = _attempt(search, candidate)
            if isinstance(found, str):
                reasons.append(found)
            elif _badness(found) < _badness(best):
                best, best_values, improved = found, candidate, True
                break
        if not improved:
            # Where the ops part says more than the shapes seen on the way there.
            ordered = sorted(best.differences, key=lambda difference: difference.kind != "op")
            texts = [difference.text for difference in ordered]
            return (*texts[:4], *((f"and {len(texts) - 4} more",) if len(texts) > 4 else ()), *reasons[:2])
    stock = search.captures[_key(best_values)]
    assert isinstance(stock, Program)
    shapes = {name: (stock.weights[name].expr.shape, stock.weights[name].expr.dtype) for name in best.binding}
    config = _config(search, best_values)
    config.architectures = [_architecture(search)]
    pictures = splices(search.program)
    if len(pictures) == 1 and hasattr(config, "image_seq_length"):
        # It says how many entries a picture gives, which the graph shows and nothing else reads.
        config.image_seq_length = pictures[0].entries
    return Stock(config, best.binding, shapes)


def _badness(found: Match) -> tuple[bool, int]:
    return any(d.kind == "op" for d in found.differences), len(found.differences)


def _attempt(search: _Search, values: Values) -> Match | str:
    stock = _capture(search, values)
    return stock if isinstance(stock, str) else match(search.program, stock)


def _key(values: Values) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _config(search: _Search, values: Values) -> Any:
    from transformers import AutoConfig

    raw = {key: value for key, value in copy.deepcopy(dict(search.raw)).items() if key != "auto_map"}
    model_type = raw.pop("model_type")
    for key, value in values.items():
        *outer, last = key.split(".")
        part = raw
        for name in outer:
            part = part.setdefault(name, {})
        part[last] = value
    return AutoConfig.for_model(model_type, **raw)


def _flat(data: Mapping[str, Any]) -> Values:
    """The values of a config and, as `vision_config.patch_size`, those of the configs that it is made of."""
    inner = {key: value for key, value in data.items() if isinstance(value, dict) and "model_type" in value}
    within = {f"{name}.{key}": value for name, part in inner.items() for key, value in _flat(part).items()}
    return {key: value for key, value in data.items() if key not in inner} | within


def _architecture(search: _Search) -> str | None:
    """The model class: that of the program, unless the search is for a config of another class."""
    own = search.program.origin.config or {}
    if search.raw.get("model_type") == own.get("model_type"):
        return search.program.origin.architecture
    return str(search.raw["architectures"][0])


def _capture(search: _Search, values: Values) -> Program | str:
    """The stock program of a config without weights, or why there is none."""
    from graphopt.frontend.pretrained import capture_config

    key = _key(values)
    if key in search.captures:
        return search.captures[key]
    program = search.program
    try:
        config = _config(search, values)
        architecture = _architecture(search)
        if architecture is not None:
            config.architectures = [architecture]
        found: Program | str = capture_config(config, dtype=program.dtype, dims=program.dims)
    except GraphoptError as error:
        found = f"stock config {_short(values)}: {error.diagnostics[0].message}"
    # A config class refuses what it cannot express with whatever its authors chose; the answer is its message.
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ZeroDivisionError, AssertionError) as error:
        found = f"stock config {_short(values)}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("transformers", "huggingface_hub"):
            raise
        found = f"stock config {_short(values)}: {str(error).strip().splitlines()[-1]}"
    search.captures[key] = found
    return found


def _short(values: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _first_guess(search: _Search) -> Values:
    """Layers, heads, width and vocabulary as the graph shows them; raises _Uneven when layers differ."""
    config = _config(search, {})
    program = search.program
    attentions = _attentions(program)
    values: Values = {}
    if attentions and config.attribute_map.get("num_hidden_layers", "num_hidden_layers") in config.to_dict():
        heads = [(a.args[0].meta["val"].shape, a.args[1].meta["val"].shape) for a in attentions]
        for what, sizes in (
            ("query heads", [int(q[1]) for q, _ in heads]),
            ("KV heads", [int(k[1]) for _, k in heads]),
            ("head sizes", [int(q[3]) for q, _ in heads]),
        ):
            if len(set(sizes)) > 1:
                raise _Uneven(f"layers have different numbers of {what}: {sizes}; a stock config has one number")
        q, k = heads[0]
        _set(config, values, "num_hidden_layers", len(attentions))
        _set(config, values, "num_attention_heads", int(q[1]))
        _set(config, values, "num_key_value_heads", int(k[1]))
        _set(config, values, "head_dim", int(q[3]))
        _truncate(search, config, values, attentions)
    embedding = _token_embedding(program)
    if embedding is not None:
        shape = program.weights[embedding].expr.shape
        _set(config, values, "vocab_size", shape[0])
        _set(config, values, "hidden_size", shape[1])
    return values


def _set(config: Any, values: Values, name: str, value: Any) -> None:
    """Set the class's own spelling of a canonical attribute, when it has one and the value changes."""
    own = config.attribute_map.get(name, name)
    if own in config.to_dict() and config.to_dict()[own] != value:
        values[own] = value


def _attentions(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.graph.nodes if n.target is torch.ops.graphopt.attention.default]


def _token_embedding(program: Program) -> str | None:
    tokens = {spec.name for spec in program.entry.inputs if spec.role == "tokens"}
    for node in program.graph.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, index = node.args[:2]
            if index.meta.get("input") in tokens and "weight" in table.meta:
                return str(table.meta["weight"])
    return None


def _truncate(search: _Search, config: Any, values: Values, attentions: list[fx.Node]) -> None:
    """Cut lists with one entry a layer to the layers that are left, told by the weights they read."""
    data = config.to_dict()
    layers = data.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    lists = {key: value for key, value in data.items() if isinstance(value, list) and len(value) == layers}
    if not lists or len(attentions) >= layers:
        # Of an encoder and a decoder, the layers in the config are one's, and attentions those of both.
        return
    kept: list[int] = []
    if any(len({json.dumps(item) for item in value}) > 1 for value in lists.values()):
        original = _capture(search, {})
        if isinstance(original, str):
            raise _Uneven(original)
        before = [_reads(node) for node in _attentions(original)]
        kept = [_closest(_reads(node), before) for node in attentions]
        if sorted(set(kept)) != kept:
            raise _Uneven(f"the layers that are left are not in the original order: {kept}")
    for key, value in lists.items():
        values[key] = [value[i] for i in kept] if kept else value[:1] * len(attentions)


def _reads(attention: fx.Node) -> set[str]:
    """The names of the weights nearest above q, k and v."""
    names: set[str] = set()
    frontier = [n for n in attention.args[:3] if isinstance(n, fx.Node)]
    for _ in range(6):
        found = {n.meta["weight"] for n in frontier if "weight" in n.meta}
        names |= found
        frontier = [i for n in frontier if n.target is not torch.ops.aten.linear.default for i in n.all_input_nodes] + [
            n.args[1] for n in frontier if n.target is torch.ops.aten.linear.default
        ]
    return names


def _closest(names: set[str], candidates: list[set[str]]) -> int:
    scores = [len(names & candidate) / max(1, len(names | candidate)) for candidate in candidates]
    return scores.index(max(scores)) if scores else 0


def _neighbours(search: _Search, values: Values, found: Match) -> Iterator[Values]:
    """Configs that answer the differences of the last match: sizes, eps, biases, ties."""
    data = _flat(_config(search, values).to_dict())
    kinds = {difference.kind for difference in found.differences}
    sizes = _size_changes(found)
    changes = [
        (key, new)
        for key, value in data.items()
        if isinstance(value, int) and not isinstance(value, bool) and not key.endswith("_id")
        for new in sorted(sizes.get(value, ()))
    ]
    # One at a time: an attribute of the same value that the graph does not show (a maximal length) must stay.
    changes.sort(key=lambda change: _SIZE_ATTRIBUTE.search(change[0]) is None)
    for key, new in changes:
        yield {**values, key: new}
    if len(changes) > 1 and len({key for key, _ in changes}) == len(changes):
        yield {**values, **dict(changes)}
    if "shape" in kinds:
        for key, value in data.items():
            # GPT-2 leaves its inner width to a default; other unset attributes are no sizes.
            if value is None and _SIZE_ATTRIBUTE.search(key):
                for new in sorted({new for options in sizes.values() for new in options}):
                    yield {**values, key: new}
    yield from _other_changes(values, found, data)


def _other_changes(values: Values, found: Match, data: Mapping[str, Any]) -> Iterator[Values]:
    kinds = {difference.kind for difference in found.differences}
    eps = {d.ours for d in found.differences if d.name == "eps"}
    keys = [k for k, v in data.items() if k.endswith(("eps", "epsilon")) and isinstance(v, float)]
    if len(eps) == 1 and keys:
        yield {**values, **dict.fromkeys(keys, eps.pop())}
    if "bias" in kinds:
        flags = [key for key, value in data.items() if key.endswith("bias") and value is False]
        for flag in flags:
            yield {**values, flag: True}
        if len(flags) > 1:
            yield {**values, **dict.fromkeys(flags, True)}
    if "binding" in kinds and "tie_word_embeddings" in data:
        yield {**values, "tie_word_embeddings": not data["tie_word_embeddings"]}


def _size_changes(found: Match) -> dict[int, set[int]]:
    """For every size of a stock weight that does not fit, the sizes that the program has in its place."""
    changes: dict[int, set[int]] = {}
    for difference in found.differences:
        if difference.kind == "shape" and len(difference.ours) == len(difference.theirs):
            for new, old in zip(difference.ours, difference.theirs, strict=True):
                if new != old:
                    changes.setdefault(old, set()).add(new)
    return changes


def refuse(reasons: tuple[str, ...]) -> ArtifactError:
    """The error of a save that demanded a stock checkpoint."""
    return ArtifactError.of(
        "no_stock_config",
        "no stock transformers config expresses this program",
        notes=reasons,
        help=("save with format 'auto' or 'graphopt'",),
    )
