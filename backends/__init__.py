"""Backends: where a program runs or is lowered. Import them as `graphopt.backends`."""

from typing import TYPE_CHECKING, Any

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends; a bare `import backends` would load a second copy of every class")

if TYPE_CHECKING:
    from graphopt.backends.programs import lower
    from graphopt.backends.running import LoweredProgram

__all__ = ["LoweredProgram", "lower"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from graphopt.backends import programs, running

        return getattr(running if name == "LoweredProgram" else programs, name)
    raise AttributeError(f"module 'graphopt.backends' has no attribute {name!r}")
