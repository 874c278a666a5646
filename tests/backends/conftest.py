"""Shared: generated sources go to a directory of the test run; graphs are traced with symbolic sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphopt.backends import load
from graphopt.backends.prepare import decompositions


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path_factory.getbasetemp() / "kernels"
    directory.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("GRAPHOPT_CACHE", str(directory))
    load.cache_directory.cache_clear()
    yield directory
    load.cache_directory.cache_clear()


def trace(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: int = 5) -> fx.GraphModule:
    """A decomposed aten graph of `function`; axes of size `dynamic` are symbolic, the others fixed."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for position, value in enumerate(inputs):
        sizes = [DimDynamic.DUCK if size == dynamic else DimDynamic.STATIC for size in value.shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"in{position}")))
    with torch.no_grad(), mode, enable_python_dispatcher():
        return make_fx(function, decomposition_table=decompositions(), tracing_mode="real")(*fakes)


def reference(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a function gives when its floating inputs are float64."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    result = function(*wide)
    return result if isinstance(result, tuple) else (result,)


def close(mine: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a result is within a few roundings of a float64 one; sums in float32 may round more often."""
    allowed = torch.finfo(mine.dtype).eps * (64 if mine.dtype == torch.float32 else 4)
    return float((mine.double() - wanted).abs().max()) <= allowed * float(wanted.abs().max())
