"""Specs through the Dynamo door: `torch.compile(model, backend="graphopt", options={"spec": "flap.yaml"})`.

A spec needs the whole model: the module that Dynamo is compiling is captured and transformed as `graphopt.compile` does
it, once for all sizes, and the lowered result stands in for Dynamo's graph. Which of its results the graph returns is
found by running both on the call's own inputs.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch._guards import tracing

from graphopt.backends.lowering import Options
from graphopt.backends.programs import lower
from graphopt.backends.running import LoweredProgram
from graphopt.compiler.compile import capture, compile
from graphopt.diagnostics import PlanError
from graphopt.frontend.pretrained import directory_of
from graphopt.ir.expressions import Source
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.spec import LoadedSpec, load_spec

# How far the capture of a model may be from the graph that Dynamo makes of it: roundings, and a share of the norm.
ROUNDINGS, MOST = 64, 0.1


@dataclass(frozen=True)
class Transformed:
    """A module's capture and what the spec made of it, lowered; `frozen` names weights that are no longer the module's."""

    key: tuple[Any, ...]
    before: Program
    after: LoweredProgram
    frozen: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Plain data: the steps that were applied, and the weights that the module's are no longer read for."""
        return {"steps": [applied.step for applied in self.after.program.trail], "frozen": list(self.frozen)}


_made: weakref.WeakKeyDictionary[torch.nn.Module, Transformed] = weakref.WeakKeyDictionary()


def with_spec(
    graph: fx.GraphModule, inputs: Sequence[Any], target: str, options: Options
) -> tuple[Callable[..., Any], Transformed]:
    """What runs instead of Dynamo's `graph`; raises PlanError where a spec cannot be applied."""
    module = _module(graph)
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        raise PlanError.of(
            "spec_needs_no_grad",
            "a spec transforms a model for inference, and this call records gradients",
            help=("call the model under torch.no_grad()", "train with a step of the spec that trains"),
        )
    if module.training:
        raise PlanError.of("spec_needs_eval", "the model is in training mode", help=("call model.eval() first",))
    values = [int(value.node.hint) if isinstance(value, torch.SymInt) else value for value in inputs]
    with tracing(None), torch.no_grad():
        made = _transformed(module, target, options)
        places = _arguments(graph, module, made.before)
        returned = _returned(graph, values, places, made.before, target)

    def run(*arguments: Any) -> tuple[torch.Tensor, ...]:
        results = made.after(**{name: arguments[place] for name, place in places.items()})
        return tuple(results[position] for position in returned)

    return run, made


def _module(graph: fx.GraphModule) -> torch.nn.Module:
    """The module whose forward is being compiled as one graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    reason = getattr(graph, "compile_subgraph_reason", None)
    if reason is None or reason.graph_break:
        raise PlanError.of(
            "spec_on_a_part",
            "the spec needs the whole model, and Dynamo breaks its graph"
            + (f": {str(reason.reason).strip().splitlines()[0]}" if reason is not None else ""),
            notes=tuple(f"at {f.filename}:{f.lineno} in {f.name}" for f in (reason.user_stack if reason else ())[-1:]),
            help=("remove the break", "transform with `graphopt run`, then compile what it saves"),
        )
    frame = InstructionTranslator.current_tx().output.root_tx
    found = frame.f_locals.get("self")
    if not isinstance(found, torch.nn.Module):
        code = frame.f_code
        raise PlanError.of(
            "spec_without_model",
            f"the spec needs a model, and Dynamo compiles the function {code.co_name} on its own",
            notes=(f"at {code.co_filename}:{code.co_firstlineno}",),
            help=(
                'compile the model itself: torch.compile(model, backend="graphopt", options={"spec": ...})',
                "where it is the model, its graph breaks: fullgraph=True says at which line",
            ),
        )
    if next(found.parameters(), None) is None:
        raise PlanError.of("spec_without_weights", f"{type(found).__name__} has no weights that a spec could change")
    return found


def _transformed(module: torch.nn.Module, target: str, options: Options) -> Transformed:
    """The module as the spec makes it; made anew when the spec or a weight was written since."""
    loaded = options.spec if isinstance(options.spec, LoadedSpec) else load_spec(options.spec, registry=PassRegistry())
    said = tuple((file.path, file.sha256) for file in loaded.files), tuple(repr(step) for step in loaded.steps)
    weights = tuple((id(p), p._version) for p in module.parameters())
    chosen = {name: getattr(options, name) for name in ("interpret", "cpu", "products")}
    key = (said, weights, target, tuple(chosen.values()))
    known = _made.get(module)
    if known is None or known.key != key:
        before = capture(module)
        home = directory_of(module)
        before = replace(before, origin=replace(before.origin, path=str(home) if home else None))
        after = lower(compile(before, loaded), target, **chosen, pack=False)
        store = after.program.weights
        read = [node.meta["weight"] for node in after.program.graph.graph.nodes if "weight" in node.meta]
        frozen = tuple(n for n in read if store[n].kind != "constant" and not isinstance(store[n].expr, Source))
        known = _made[module] = Transformed(key, before, after, frozen)
    return known


def _arguments(graph: fx.GraphModule, module: torch.nn.Module, program: Program) -> dict[str, int]:
    """Which argument of the graph each input of the program is; inputs that the call leaves out are not in it."""
    names = list(inspect.signature(module.forward).parameters)
    known = {spec.name for spec in program.entry.inputs}
    places: dict[str, int] = {}
    for place, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = _argument_name(source.name if source is not None else "", names)
        if name is None or isinstance(node.meta.get("example_value"), torch.SymInt):
            continue
        if name not in known:
            raise PlanError.of(
                "spec_on_other_inputs",
                f"the call passes {name!r}, which the captured program does not take",
                notes=(f"it takes {', '.join(sorted(known))}",),
            )
        places[name] = place
    if not places:
        raise PlanError.of("spec_on_other_inputs", f"the call passes none of {', '.join(sorted(known))}")
    return places


def _argument_name(source: str, names: Sequence[str]) -> str | None:
    """The parameter of `forward` that Dynamo's name of a value means: L['ids'], L['args'][0] or L['kwargs']['ids']."""
    keys = [part.rstrip("]").strip("'\"") for part in source.split("[")[1:]]
    if not source.startswith("L[") or "." in source:
        return None
    if len(keys) == 2 and keys[0] == "args" and keys[1].isdigit() and int(keys[1]) < len(names):
        return names[int(keys[1])]
    if len(keys) == 2 and keys[0] == "kwargs":
        return keys[1]
    return keys[0] if len(keys) == 1 and keys[0] in names else None


def _returned(
    graph: fx.GraphModule, values: Sequence[Any], places: Mapping[str, int], program: Program, target: str
) -> tuple[int, ...]:
    """The results of the program, as captured, that the graph returns."""
    wanted = graph(*values)
    found = program.module(program.dtype, target)(**{name: values[place] for name, place in places.items()})
    positions = []
    for value in wanted if isinstance(wanted, tuple | list) else (wanted,):
        equal = [i for i, mine in enumerate(found) if isinstance(value, torch.Tensor) and _same(mine, value)]
        if not equal:
            what = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise PlanError.of(
                "spec_on_other_results",
                f"the model returns {what}, which is none of {', '.join(program.entry.outputs)}",
                help=("call it with use_cache=False and without hidden states, attentions or labels",),
            )
        positions.append(equal[0])
    return tuple(positions)


def _same(mine: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results are one up to rounding, by the norm of their difference."""
    if mine.shape != wanted.shape or mine.dtype != wanted.dtype or not mine.is_floating_point():
        return False
    allowed: float = min(ROUNDINGS * torch.finfo(mine.dtype).eps, MOST)
    distance: float = (mine.double() - wanted.double()).norm().item()
    return distance <= allowed * float(wanted.double().norm())
