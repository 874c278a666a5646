"""Launching a step's kernels as one CUDA graph: static buffers for what changes, the caller's own for what stays.

Weights and caches are read and written where they lie; a graph belongs to their addresses. The other inputs (tokens,
lengths, positions) are copied into buffers of the graph, and its results out of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from graphopt.backends.running import Lowered

Outputs: TypeAlias = tuple[Any, ...]
Capture: TypeAlias = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

WAITS = frozenset({"graphopt.cached_attention.default"})  # references that ask the device for numbers
_REFUSED = {
    torch.Tag.data_dependent_output: "its result depends on numbers that the device computes",
    torch.Tag.dynamic_output_shape: "the shape of its result depends on numbers that the device computes",
    torch.Tag.nondeterministic_seeded: "it draws random numbers",
}


def obstacle(lowered: Lowered) -> str | None:
    """Why the launches of a lowered graph cannot be repeated as they are; None when they can."""
    if lowered.graph is None or not any("kernel" in node.meta for node in lowered.graph.graph.nodes):
        return f"it runs as {lowered.mode}"
    for node in lowered.graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if str(node.target) in WAITS:
            return f"{node.target} runs as a library call, which waits for the device"
        for tag, words in _REFUSED.items():
            if tag in node.target.tags:
                return f"{node.target} runs as a library call, and {words}"
    return None


def cuda_graph(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record what `run` launches; run first, so that everything is compiled, chosen and allocated."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


@dataclass
class _Recorded:
    arguments: list[Any]
    replay: Callable[[], None]
    outputs: Outputs


@dataclass
class Replay:
    """Calls `run` by graphs, one for each set of shapes and of addresses of what is `held`; at most `most` are kept.

    `held` says of each argument whether it stays where it is. Results are the caller's own. What `run` writes into held
    arguments it must write again when it runs again, because recording runs it more than once.
    """

    run: Callable[..., Outputs]
    held: Sequence[bool]
    capture: Capture = cuda_graph
    most: int = 8
    _recorded: OrderedDict[Any, _Recorded] = field(default_factory=OrderedDict)

    def __call__(self, *arguments: Any) -> Outputs:
        """Run on tensors and numbers; raises ValueError for another number of arguments."""
        if len(arguments) != len(self.held):
            raise ValueError(f"{len(self.held)} arguments are wanted, not {len(arguments)}")
        key = tuple(_form(value, held) for value, held in zip(arguments, self.held, strict=True))
        found = self._recorded.get(key)
        if found is None:
            found = self._record(arguments)
            self._recorded[key] = found
            if len(self._recorded) > self.most:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        for own, given in zip(found.arguments, arguments, strict=True):
            if own is not given and isinstance(own, torch.Tensor) and own.data_ptr() != given.data_ptr():
                own.copy_(given)
        found.replay()
        return tuple(out.clone() if isinstance(out, torch.Tensor) else out for out in found.outputs)

    def _record(self, arguments: Sequence[Any]) -> _Recorded:
        own = [
            value.clone() if isinstance(value, torch.Tensor) and not held else value
            for value, held in zip(arguments, self.held, strict=True)
        ]
        replay, outputs = self.capture(lambda: tuple(self.run(*own)))
        return _Recorded(own, replay, outputs)


def _form(value: Any, held: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    place = value.data_ptr() if held else None
    return tuple(value.shape), value.stride(), value.dtype, value.device, place
