"""Config classes that may say a program whose feed-forwards have become banks of experts, which its own class may not.

There is no table of architectures: classes are found among those of the model's own task by what their attributes count,
the most similar first, and a model of one layer of each is captured to see whether it computes with the same operations.
What is left is proposed; the match with the whole graph is the proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphopt.diagnostics import GraphoptError
from graphopt.ir.program import Program
from graphopt.views import Experts, Views

MOST_LOOKED_AT = 24
_EXPERTS = re.compile(r"(num|n)_(local_|routed_)?experts")
_CHOSEN = re.compile(r"num_experts_per_tok(en)?")
_SUMS = re.compile(r"norm_topk_prob")
_TIME = re.compile(r"conv|mamba|ssm|linear_")
_SHARED = re.compile(r"shared.*(size|experts)|shared_experts")


def relatives(program: Program, raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Raw configs of other classes to try for a program with banks, each with the sizes that the graph shows."""
    banks = Views(program).experts
    shapes = {(bank.experts, bank.top_k, bank.neurons, len(bank.shared)) for bank in banks}
    if len(shapes) != 1 or banks[0].top_k is None or _counts(raw, _EXPERTS):
        return
    ours = _kinds(program)
    for candidate in _similar(program, raw, sum(each.neurons for each in banks[0].shared), banks[0].neurons):
        made = _filled(candidate, raw, banks[0])
        # Whether the weights of those chosen are made to sum to 1.
        sums = any(kind.startswith("aten.div") for kind in ours)
        made |= {key: sums for key, value in made.items() if _SUMS.fullmatch(key) and isinstance(value, bool)}
        one = _one_layer(program, made)
        if one is None:
            continue
        theirs = Views(one).experts
        if theirs and _kinds(one) == ours:
            yield made


def _counts(config: Mapping[str, Any], what: re.Pattern[str]) -> list[str]:
    return [key for key in config if what.fullmatch(key)]


def _kinds(program: Program) -> set[str]:
    """The operations that a program consists of, layouts and sizes aside."""
    layouts = ("view", "reshape", "_unsafe_view", "sym_size", "to.")
    targets = {node.target for node in program.graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return {str(target) for target in targets if not str(target).startswith(tuple(f"aten.{word}" for word in layouts))}


def _similar(program: Program, raw: Mapping[str, Any], neurons: int, width: int) -> list[dict[str, Any]]:
    """Default configs of the classes that have experts, for the task of the program's class, the most similar first.

    All tokens go through `neurons`, and experts have `width`.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tables = [getattr(modeling_auto, name) for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    table = next((t for t in tables if program.origin.architecture in t.values()), None)
    if table is None:
        return []
    own = set(AutoConfig.for_model(**_plain(raw)).to_dict())
    found = []
    for model_type, architecture in table.items():
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
        # A config class that has no defaults, or refuses its own, is none to fall back on.
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("transformers", "huggingface_hub", "builtins"):
                raise
            continue
        if not _counts(config, _EXPERTS) or not _counts(config, _CHOSEN) or not isinstance(architecture, str):
            continue
        keys = [key for key in config if _SHARED.search(key)]
        # What is counted in experts is as wide as so many of them.
        if bool(neurons) != bool(keys) or (neurons % width and not any(key.endswith("size") for key in keys)):
            continue
        config |= {"model_type": model_type, "architectures": [architecture]}
        foreign = any(_TIME.search(key) for key in set(config) - own)
        found.append((foreign, -len(own & set(config)) / len(own | set(config)), config))
    # Convolutions and states over time that the model has not are captured slowly, and say something else.
    ordered = sorted(found, key=lambda each: each[:2])
    return [config for *_, config in ordered[:MOST_LOOKED_AT]]


def _plain(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != "auto_map"}


def _filled(candidate: Mapping[str, Any], raw: Mapping[str, Any], bank: Experts) -> dict[str, Any]:
    """A candidate with what both classes say taken over, and the sizes of a bank."""
    identity = ("model_type", "architectures")
    layers = candidate.get("num_hidden_layers")
    # Lists with one entry a layer of the default model are left to the class.
    candidate = {k: v for k, v in candidate.items() if not isinstance(v, list) or len(v) != layers or k in identity}
    made = {key: raw[key] if key in raw and key not in identity else value for key, value in candidate.items()}
    for key in _counts(made, _EXPERTS):
        made[key] = bank.experts
    for key in _counts(made, _CHOSEN):
        made[key] = bank.top_k
    width = next(
        (key for key in ("moe_intermediate_size", "expert_intermediate_size") if key in made), "intermediate_size"
    )
    made[width] = bank.neurons
    if bank.shared:
        for key in made:
            if _SHARED.search(key) and key.endswith("size"):
                made[key] = sum(each.neurons for each in bank.shared)
    return made


def _one_layer(program: Program, raw: Mapping[str, Any]) -> Program | None:
    """The model of a config with one layer, without weights; None when there is none."""
    from transformers import AutoConfig

    from graphopt.frontend.pretrained import capture_config

    values = _plain(raw)
    try:
        config = AutoConfig.for_model(**{**values, "num_hidden_layers": 1})
        return capture_config(config, dtype=program.dtype, dims=program.dims)
    # A class that cannot be built with these sizes does not say the program.
    except (
        GraphoptError,
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        LookupError,
        AttributeError,
        AssertionError,
    ):
        return None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("transformers", "huggingface_hub"):
            raise
        return None
