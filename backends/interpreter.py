"""Running generated kernels on a CPU under Triton's interpreter, whether or not TRITON_INTERPRET was set at import."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

_FUNCTIONS = ("sum", "max", "min", "cdiv", "zeros", "zeros_like", "sigmoid", "softmax", "ravel", "argmax", "argmin")
_interpreted: dict[str, Any] = {}


def _patched() -> tuple[Any, ...]:
    """What the interpreter writes to; it restores only part of that when interpreted functions call each other."""
    return (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """What the interpreter does to tensors, and bounds of loops that are arrays of one number.

    Triton 3.6 leaves those to numpy, which from 2.5 on takes only arrays without axes for numbers.
    """
    _as_it_was(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_as_it_was = interpreter._patch_lang_tensor


@contextmanager
def interpreting() -> Iterator[None]:
    """Within it, `@triton.jit` makes interpreted functions and library functions of `tl` run interpreted."""
    before = [(place, dict(vars(place))) for place in _patched()]
    knob = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    interpreter._patch_lang_tensor = _patch_tensor
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
        interpreter._patch_lang_tensor = _as_it_was
        triton.knobs.runtime.interpret = knob
