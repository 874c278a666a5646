"""Running generated kernels on a CPU under Triton's interpreter, whether or not TRITON_INTERPRET was set at import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

_FUNCTIONS = ("sum", "max", "min", "cdiv", "zeros", "zeros_like", "sigmoid", "softmax", "ravel", "argmax", "argmin")
_interpreted: dict[str, Any] = {}


def _patched() -> tuple[Any, ...]:
    """What the interpreter writes to; it restores only part of that when interpreted functions call each other."""
    return (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, `@triton.jit` makes interpreted functions and library functions of `tl` run interpreted."""
    before = [(place, dict(vars(place))) for place in _patched()]
    knob = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        for name in _FUNCTIONS:
            function = getattr(tl, name)
            if not isinstance(function, InterpretedFunction):
                if name not in _interpreted:
                    _interpreted[name] = InterpretedFunction(function.fn)
                setattr(tl, name, _interpreted[name])
        yield
    finally:
        for place, values in before:
            for name, value in list(vars(place).items()):
                if name in values and values[name] is not value:
                    setattr(place, name, values[name])
        triton.knobs.runtime.interpret = knob
