"""Running programs: generation."""

from graphopt.runtime.generate import generate

__all__ = ["generate"]
