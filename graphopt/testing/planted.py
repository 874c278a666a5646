"""Planted bugs: the kit's own proof. Each breaks a pass or the machinery under it, and names the law that must notice.

`python -m graphopt.testing.planted` plants each in turn and prints which law caught it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from graphopt.artifact import native
from graphopt.artifact.tensors import Entry
from graphopt.compiler import verify
from graphopt.cost import count, node_flops
from graphopt.ir import rewriter as rewriting
from graphopt.ir.program import Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import MemorySource
from graphopt.ops import Slots
from graphopt.passes.depth.skip_layers import SkipLayers
from graphopt.passes.width.prune_neurons import PruneNeurons
from graphopt.passkit import Context, Cut, Effect, Pass, PassRegistry, Plan, Skip
from graphopt.passkit.edits import apply_edits
from graphopt.runtime.cache import Cache
from graphopt.testing import trial as trials
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import LawBroken
from graphopt.views import cutting, indices, size_of

aten = torch.ops.aten
HEADS = Shape(layers=2, heads=4, kv_heads=2, head_dim=4, hidden=6, neurons=5, biases=True)


@dataclass(frozen=True)
class Planted:
    """A bug, the law that must catch it, and a configuration and a model that show it."""

    name: str
    law: str
    plant: Callable[[], AbstractContextManager[Any]]
    use: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape = HEADS

    def case(self) -> tuple[Pass, Program]:
        """A fresh configuration and a private copy of the model, because some bugs write into what they are given."""
        config = PassRegistry().get(self.use).model_validate_json(json.dumps(self.options))
        program = Rewriter(build(self.shape)).finish()
        assert isinstance(program.weights.source, MemorySource)
        tensors = {name: tensor.clone() for name, tensor in program.weights.source.tensors.items()}
        return config, replace(program, weights=replace(program.weights, source=MemorySource(tensors)))

    def broken_laws(self, *, planted: bool = True) -> dict[str, str]:
        """The laws that break with the bug (or without it), with their messages."""
        found = {}
        for name, law in LAWS.items():
            config, program = self.case()
            try:
                if planted:
                    with self.plant():
                        law(config, program)
                else:
                    law(config, program)
            except LawBroken as error:
                found[name] = error.message
        return found


@contextmanager
def swapped_head() -> Iterator[None]:
    """The first weight that is cut keeps the right heads in the wrong order."""
    true, swapped = cutting._Cutter.kept, set()

    def kept(self: Any, axis: Any) -> Any:
        found = true(self, axis)
        if self in swapped or len(found) < 2:
            return found
        swapped.add(self)
        half = len(found) // 2
        return found[[*range(half, len(found)), *range(half)]]

    with patch.object(cutting._Cutter, "kept", kept):
        yield


@contextmanager
def off_by_one_slice() -> Iterator[None]:
    """Every slice of a weight starts one entry late."""
    true = indices

    def late(axis: Any, keep: Any) -> Any:
        found = true(axis, keep)
        size = size_of(axis)
        return found if len(found) == size else (found + 1) % size

    with patch.object(cutting, "indices", late):
        yield


@contextmanager
def missing_tie() -> Iterator[None]:
    """A rewrite gives the second name of a tied weight a tensor of its own."""
    true = Rewriter.finish

    def finish(self: Rewriter, inputs: Any = None) -> Program:
        for weight in list(self.weights.weights.values()):
            users = list(self.weight_node(weight.name).users) if weight.aliases else []
            if len(users) > 1 and weight.aliases[0] not in self.weights:
                copy = self.add_weight(weight.aliases[0], weight.expr)
                users[-1].replace_input_with(self.weight_node(weight.name), copy)
        return true(self, inputs)

    with patch.object(Rewriter, "finish", finish):
        yield


@contextmanager
def stale_node() -> Iterator[None]:
    """Dead code stays where it was."""
    with patch.object(rewriting, "eliminate_dead_code", lambda graph: 0):
        yield


@contextmanager
def stale_edge() -> Iterator[None]:
    """Edits planned together act on the nodes of the original graph, not on what those became."""
    with patch.object(Rewriter, "node", lambda self, key: self._names[key if isinstance(key, str) else key.name]):
        yield


@contextmanager
def norm_without_eps() -> Iterator[None]:
    """A narrower RMSNorm gets its gain and keeps its eps."""
    true = cutting._Cutter.fold_norm

    def fold(self: Any, node: Any, axis: Any) -> None:
        today = self.rewriter.node(node)
        eps = today.args[2]
        true(self, node, axis)
        today.args = (*today.args[:2], eps, *today.args[3:])

    with patch.object(cutting._Cutter, "fold_norm", fold):
        yield


@contextmanager
def inverse_norm_scale() -> Iterator[None]:
    """A narrower RMSNorm is scaled by sqrt(d' / d)."""
    true = cutting._Cutter._scale_gain
    with patch.object(cutting._Cutter, "_scale_gain", lambda self, gain, scale: true(self, gain, 1 / scale)):
        yield


@contextmanager
def forgotten_bias() -> Iterator[None]:
    """The mean of what is cut never reaches the bias."""
    with patch.object(Cut, "compensate", lambda self, rewriter, views: None):
        yield


@contextmanager
def wide_tolerance() -> Iterator[None]:
    """Verification allows an error of 1."""
    with patch.object(verify, "tolerance", lambda dtype, terms: 1.0):
        yield


def _planning(change: Callable[[Context, Plan], Plan]) -> Callable[[], AbstractContextManager[Any]]:
    true = SkipLayers.plan
    return lambda: patch.object(SkipLayers, "plan", lambda self, context: change(context, true(self, context)))


def _mutate(context: Context, plan: Plan) -> Plan:
    output = context.program.output_nodes[0]
    add = next(node for node in context.program.graph.graph.nodes if node.target is aten.add.Tensor)
    assert output is not add
    add.args = (add.args[1], add.args[0])
    return plan


def _result(change: Callable[[Rewriter, Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    """A bug that changes what surgery returns."""
    true = apply_edits

    def apply(*arguments: Any) -> Program:
        rewriter = Rewriter(true(*arguments))
        node = rewriter.node(rewriter.program.output_nodes[0])
        made = change(rewriter, node)
        rewriter.replace(node, made, keep=lambda user: user is made)
        return rewriter.finish()

    return lambda: patch.object(trials, "apply_edits", apply)


@contextmanager
def written_input() -> Iterator[None]:
    """An edit computes in place, in the tensors of the model it was given."""
    true = Skip.apply

    def apply(self: Skip, rewriter: Rewriter, views: Any) -> None:
        source = rewriter.program.weights.source
        assert source is not None
        source.get("embedding.weight").mul_(2)
        true(self, rewriter, views)

    with patch.object(Skip, "apply", apply):
        yield


@contextmanager
def rounded_checkpoint() -> Iterator[None]:
    """Weights lose bits on their way to disk."""
    true = native._entry

    def entry(program: Program, name: str, *, finite: bool = True) -> Entry:
        made = true(program, name, finite=finite)
        return Entry(made.shape, made.dtype, lambda: program.weights.evaluate(name).bfloat16().to(made.dtype), finite)

    with patch.object(native, "_entry", entry):
        yield


@contextmanager
def forgotten_flops() -> Iterator[None]:
    """Attention costs nothing."""
    true = node_flops
    attention = torch.ops.graphopt.attention.default
    with patch.object(count, "node_flops", lambda node: 0 if node.target is attention else true(node)):
        yield


@contextmanager
def uncounted_entry() -> Iterator[None]:
    """The cache does not count the last token that was written."""
    true = Cache.commit
    with patch.object(Cache, "commit", lambda self, kept: true(self, kept - 1 if isinstance(kept, int) else kept)):
        yield


@contextmanager
def wide_window() -> Iterator[None]:
    """A cached window shows one entry too many."""
    true = Slots.visible
    with patch.object(Slots, "visible", lambda self, window: true(self, window and window + 1)):
        yield


_SKIP = {"layers": 1}
_HIDDEN = {"keep": "50%"}
_BIAS = {"keep": "60%", "compensate": "mean_bias"}
BUGS = (
    Planted("swapped head index", "surgery_equals_emulation", swapped_head, "prune_heads", {"keep": "50%"}),
    Planted("off-by-one slice", "surgery_equals_emulation", off_by_one_slice, "prune_heads", {"keep": "50%"}),
    Planted(
        "missing tie", "ties_stay_ties", missing_tie, "prune_neurons", {"keep": "60%"}, Shape(tied=True, neurons=5)
    ),
    Planted("stale node", "nothing_left_behind", stale_node, "skip_layers", _SKIP),
    Planted("stale edge", "nothing_left_behind", stale_edge, "skip_layers", {"remove": 2, "choose": "last"}, Shape(3)),
    Planted("wrong norm fold: eps", "surgery_equals_emulation", norm_without_eps, "prune_hidden", _HIDDEN),
    Planted("wrong norm fold: gain", "surgery_equals_emulation", inverse_norm_scale, "prune_hidden", _HIDDEN),
    Planted("forgotten bias", "surgery_equals_emulation", forgotten_bias, "prune_neurons", _BIAS),
    Planted("tolerance too wide", "verification_can_fail", wide_tolerance, "skip_layers", _SKIP),
    Planted("plan that mutates", "plan_is_pure", _planning(_mutate), "skip_layers", _SKIP),
    Planted("silent no-op", "plan_is_complete", _planning(lambda context, plan: Plan(())), "skip_layers", _SKIP),
    Planted(
        "forgotten candidate",
        "plan_is_complete",
        _planning(lambda context, plan: Plan(plan.edits, plan.declines[1:])),
        "skip_layers",
        _SKIP,
    ),
    Planted(
        "false claim of exactness",
        "exact_means_exact",
        lambda: patch.object(PruneNeurons, "effect", Effect.EXACT),
        "prune_neurons",
        {"keep": "60%"},
    ),
    Planted(
        "false claim of idempotence",
        "second_run_is_declared",
        lambda: patch.object(PruneNeurons, "idempotent", new=True),
        "prune_neurons",
        {"keep": "60%"},
    ),
    Planted(
        "edit that is no data",
        "edits_are_data",
        lambda: patch.object(Skip, "to_json", lambda self: {"parts": (1, 2)}),
        "skip_layers",
        _SKIP,
    ),
    Planted(
        "captured length baked in",
        "runs_at_other_shapes",
        _result(lambda rewriter, node: rewriter.call(aten.slice.Tensor, node, 1, 0, 19, after=node)),
        "skip_layers",
        _SKIP,
    ),
    Planted(
        "gradient cut off",
        "gradients_flow",
        _result(lambda rewriter, node: rewriter.call(aten.detach.default, node, after=node)),
        "skip_layers",
        _SKIP,
    ),
    Planted("bits lost on disk", "save_and_load_keep_bits", rounded_checkpoint, "skip_layers", _SKIP),
    Planted("FLOPs forgotten", "cost_is_counted", forgotten_flops, "skip_layers", _SKIP),
    Planted(
        "option lost in YAML",
        "yaml_round_trip",
        lambda: patch.object(SkipLayers, "to_yaml", lambda self: {"use": "skip_layers", "layers": "0"}),
        "skip_layers",
        _SKIP,
    ),
    Planted("uncounted cache entry", "generation_is_kept", uncounted_entry, "insert_cache"),
    Planted("cached window too wide", "generation_is_kept", wide_window, "insert_cache", {}, Shape(window=2)),
    Planted("input written", "input_is_untouched", written_input, "skip_layers", _SKIP),
)


def table() -> str:
    """Every bug with the law that must catch it, and all laws that do."""
    lines = [f"{'planted bug':<28} {'must be caught by':<26} caught by"]
    for bug in BUGS:
        laws = bug.broken_laws()
        mark = "" if bug.law in laws else "   MISSED"
        lines.append(f"{bug.name:<28} {bug.law:<26} {', '.join(laws) or 'nothing'}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
