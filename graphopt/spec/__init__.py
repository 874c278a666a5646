"""Specs: strict YAML with places, values with units, expressions, composition and lock files."""

from graphopt.spec.expr import Expr
from graphopt.spec.limits import AtMost, AtMostBytes, AtMostCount, AtMostNumber, AtMostPercent
from graphopt.spec.load import LoadedSpec, Registry, StepSpec, load_spec, parse_spec
from graphopt.spec.lock import Lock, read_lock, write_lock
from graphopt.spec.model import (
    Calibration,
    Checks,
    Evaluation,
    PerplexityCheck,
    Save,
    Shorthand,
    Spec,
    Strict,
    Verify,
    Where,
)
from graphopt.spec.paths import safe_output
from graphopt.spec.scalars import ScalarError
from graphopt.spec.schema import json_schema
from graphopt.spec.selectors import Layers, select_paths
from graphopt.spec.units import ByteSize, Count, Duration, Percent, Share

__all__ = [
    "AtMost",
    "AtMostBytes",
    "AtMostCount",
    "AtMostNumber",
    "AtMostPercent",
    "ByteSize",
    "Calibration",
    "Checks",
    "Count",
    "Duration",
    "Evaluation",
    "Expr",
    "Layers",
    "LoadedSpec",
    "Lock",
    "Percent",
    "PerplexityCheck",
    "Registry",
    "Save",
    "ScalarError",
    "Share",
    "Shorthand",
    "Spec",
    "StepSpec",
    "Strict",
    "Verify",
    "Where",
    "json_schema",
    "load_spec",
    "parse_spec",
    "read_lock",
    "safe_output",
    "select_paths",
    "write_lock",
]
