"""The Dynamo door: `torch.compile(model, backend="graphopt", options={...})`.

Dynamo captures, AOTAutograd makes the graphs functional, `graphopt.backends.lower_graph` lowers them. Options:
`interpret` (run generated Triton kernels under the interpreter), `cpu` ("eager" or "inductor"), `backward` ("eager" or
"inductor"), `report` (a path that JSON is written to, or a list that gets one entry a graph), `spec` (what the model is
transformed by first).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.backends.direct import calls, direct
from graphopt.backends.lowering import Options, lower_graph
from graphopt.backends.prepare import raise_sdpa
from graphopt.backends.running import Lowered


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured; raises PlanError for an unknown option."""
    chosen = Options.of(options)
    target = chosen.target or _device(inputs)
    if chosen.spec is not None:
        from graphopt.compiler.dynamo_spec import with_spec

        run, made = with_spec(graph, inputs, target, chosen)
        _report({**made.after.lowered.describe(), **made.describe()}, chosen)
        return run
    kernels = chosen.kernels_on(target)
    if not kernels and chosen.cpu == "eager" and not _records_gradients(inputs):
        run = direct(graph)
        _report(Lowered(run, target, "eager library calls", library=calls(graph.graph)).describe(), chosen)
        return run
    if kernels:
        raise_sdpa(graph)

    def forward(traced: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        return lower(traced, chosen.backward)

    def inference(traced: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        return lower(traced, None)

    def lower(traced: fx.GraphModule, backward: str | None) -> Lowered:
        lowered = lower_graph(traced, target, chosen)
        lowered.backward = backward
        _report(lowered.describe(), chosen)
        return lowered

    def backward(traced: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        if chosen.backward == "inductor":
            from torch._inductor.compile_fx import compile_fx_inner

            return compile_fx_inner(traced, example)  # type: ignore[no-any-return]
        return _boxed(traced)

    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        decompositions=chosen.decompositions(target),
        keep_inference_input_mutations=True,
    )
    return compiler(graph, inputs)  # type: ignore[no-any-return]


def _boxed(graph: fx.GraphModule) -> Callable[..., Any]:
    from torch._functorch._aot_autograd.utils import make_boxed_func

    return make_boxed_func(graph.forward)  # type: ignore[no-any-return]


def _records_gradients(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _device(inputs: Sequence[Any]) -> str:
    devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    return "cuda" if "cuda" in devices else "cpu"


def _report(entry: dict[str, Any], options: Options) -> None:
    if isinstance(options.report, list):
        options.report.append(entry)
    elif options.report is not None:
        path = Path(options.report)
        known = json.loads(path.read_text()) if path.is_file() else []
        path.write_text(json.dumps([*known, entry], indent=1) + "\n")
