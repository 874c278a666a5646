"""The registry of passes: built-ins in a table, third parties through the entry point group `graphopt.passes`.

Nothing is imported until a pass is used; a name that two providers claim is an error that names both.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from graphopt.diagnostics import SpecError, did_you_mean

if TYPE_CHECKING:
    from graphopt.passkit.base import Pass

BUILT_IN = {
    "add_momentum": "graphopt.passes.experts.add_momentum:AddMomentum",
    "bound_cache": "graphopt.passes.cache.bound_cache:BoundCache",
    "cleanup": "graphopt.passes.simplify.cleanup:Cleanup",
    "drop_tokens": "graphopt.passes.tokens.drop_tokens:DropTokens",
    "insert_cache": "graphopt.passes.cache.insert_cache:InsertCache",
    "insert_exit": "graphopt.passes.speculative.insert_exit:InsertExit",
    "insert_heads": "graphopt.passes.speculative.insert_heads:InsertHeads",
    "learn_gates": "graphopt.passes.cache.learn_gates:LearnGates",
    "merge_experts": "graphopt.passes.experts.merge_experts:MergeExperts",
    "merge_tokens": "graphopt.passes.tokens.merge_tokens:MergeTokens",
    "mix_heads": "graphopt.passes.attention.mix_heads:MixHeads",
    "prune_experts": "graphopt.passes.width.prune_experts:PruneExperts",
    "prune_heads": "graphopt.passes.width.prune_heads:PruneHeads",
    "prune_hidden": "graphopt.passes.width.prune_hidden:PruneHidden",
    "prune_neurons": "graphopt.passes.width.prune_neurons:PruneNeurons",
    "prune_units": "graphopt.passes.width.prune_units:PruneUnits",
    "quantize": "graphopt.passes.weights.quantize:Quantize",
    "quantize_cache": "graphopt.passes.cache.quantize_cache:QuantizeCache",
    "recover": "graphopt.passes.training.recover:Recover",
    "refactor_moe": "graphopt.passes.experts.refactor_moe:RefactorMoE",
    "regroup_kv": "graphopt.passes.attention.regroup_kv:RegroupKV",
    "reroute": "graphopt.passes.experts.reroute:Reroute",
    "resize_patches": "graphopt.passes.tokens.resize_patches:ResizePatches",
    "self_contrast": "graphopt.passes.experts.self_contrast:SelfContrast",
    "skip_layers": "graphopt.passes.depth.skip_layers:SkipLayers",
    "speculate": "graphopt.passes.speculative.speculate:Speculate",
}


class PassRegistry:
    """Pass classes by the name that YAML uses."""

    def names(self) -> Iterable[str]:
        """All names, sorted."""
        return sorted({*BUILT_IN, *_third_party()})

    def get(self, name: str, /) -> type[Pass]:
        """The class of a name; raises SpecError with the closest match when there is none."""
        if name in BUILT_IN:
            module, _, attribute = BUILT_IN[name].partition(":")
            found: type[Pass] = getattr(import_module(module), attribute)
            return found
        provided = _third_party().get(name)
        if provided is None:
            raise SpecError.of("unknown_pass", f"unknown pass {name!r}", help=did_you_mean(name, self.names()))
        loaded: type[Pass] = provided.load()
        return loaded


@cache
def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="graphopt.passes"):
        known = BUILT_IN.get(point.name) or (found[point.name].value if point.name in found else None)
        if known is not None:
            raise SpecError.of("pass_name_clash", f"pass {point.name!r} is offered by both {known} and {point.value}")
        found[point.name] = point
    return found
