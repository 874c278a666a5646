"""The text form of a Program: printed, fingerprinted and compared; `graphopt.ir.text_parse` reads it back.

One line a weight and one line a node, weights by checkpoint name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.diagnostics import ArtifactError
from graphopt.ir.program import Program
from graphopt.ir.text_parse import BARE_NAME, DTYPE_NAMES, PYTHON_OPS, VERSION, parse_program
from graphopt.ir.weights import Weight

__all__ = ["diff_text", "fingerprint", "parse_program", "print_program"]

_PYTHON_NAME = {function: name for name, function in PYTHON_OPS.items()}


def print_program(program: Program) -> str:
    """The program as text: dimensions, inputs, weights, then one line a node with its module path as a comment.

    Raises ArtifactError when a node calls something that is no known op.
    """
    names = {node: _reference(node) for node in program.graph.graph.nodes}
    lines = [f"graphopt {VERSION}", *_header(program)]
    order = [node.meta["weight"] for node in program.graph.graph.nodes if "weight" in node.meta]
    lines += [_weight_line(program.weights[name]) for name in order]
    lines += [_weight_line(program.weights[name]) + " unread" for name in program.weights if name not in set(order)]
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            path = node.meta.get("path")
            lines.append(f"{names[node]} = {_call(node, names)}" + (f"  # {json.dumps(path)[1:-1]}" if path else ""))
        elif node.op not in ("placeholder", "output"):
            raise ArtifactError.of("not_textual", f"node %{node.name} is a {node.op}: programs hold only op calls")
    lines.append(_return(program, names))
    return "\n".join(lines) + "\n"


def fingerprint(program: Program) -> str:
    """A sha256 of the graph, its dimensions, and its weights' names, shapes and dtypes; not of values or node names."""
    names: dict[fx.Node, str] = {}
    lines = _header(program) + sorted(_weight_line(weight) for weight in program.weights.weights.values())
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            names[node] = _reference(node)
        elif node.op == "call_function":
            lines.append(_call(node, names))
            names[node] = f"%{len(names)}"
    lines.append(_return(program, names))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def diff_text(a: Program, b: Program) -> str:
    """A unified diff of two programs, nodes named within their module path; empty when they are equal."""
    before, after = _by_path(a), _by_path(b)
    return "\n".join(difflib.unified_diff(before, after, "before", "after", n=1, lineterm=""))


def _by_path(program: Program) -> list[str]:
    """Lines in which a node's name depends on its module path alone, so that edits elsewhere do not show."""
    symbols = _symbol_names(program)
    names: dict[fx.Node, str] = {}
    counts: dict[tuple[str, str], int] = {}
    lines = _header(program) + [_weight_line(weight) for weight in program.weights.weights.values()]
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            names[node] = _reference(node)
        if node.op != "call_function":
            continue
        path, kind = str(node.meta.get("path", "")), _target(node).rsplit(".", 2)[-2]
        count = counts[path, kind] = counts.get((path, kind), -1) + 1
        names[node] = f"%{path}:{kind}" + (f".{count}" if count else "")
        here = {n: names[n].replace(f"%{path}:", "%") for n in node.all_input_nodes}
        lines.append(f"{path}: {names[node].rsplit(':', 1)[1]} = {_call(node, here)}{_type_of(node, symbols)}")
    return [*lines, _return(program, names)]


def _symbol_names(program: Program) -> dict[str, str]:
    specs = {spec.name: spec for spec in program.entry.inputs}
    found = {}
    for node in program.graph.graph.nodes:
        value = node.meta.get("val")
        if "input" in node.meta and isinstance(value, torch.Tensor):
            for size, name in zip(value.shape, specs[node.meta["input"]].shape, strict=True):
                found[str(size)] = str(name)
    return found


def _type_of(node: fx.Node, symbols: Mapping[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(re.sub(r"\bs\d+\b", lambda m: symbols.get(m[0], m[0]), str(size)) for size in value.shape)
    return f" -> {DTYPE_NAMES[value.dtype]}[{sizes}]"


def _header(program: Program) -> list[str]:
    lines = [f"dtype {DTYPE_NAMES[program.dtype]}"]
    lines += [f"dim {dim.name} {dim.low}..{dim.high} hint {dim.hint}" for dim in program.dims]
    for spec in program.entry.inputs:
        sizes = ", ".join(map(str, spec.shape))
        lines.append(f"input {_name('$', spec.name)} {DTYPE_NAMES[spec.dtype]}[{sizes}] {spec.role}")
    return lines


def _weight_line(weight: Weight) -> str:
    sizes = ", ".join(map(str, weight.expr.shape))
    line = f"weight {_name('@', weight.name)} {weight.kind} {DTYPE_NAMES[weight.expr.dtype]}[{sizes}]"
    return line + (" aliases " + ", ".join(_name("@", name) for name in weight.aliases) if weight.aliases else "")


def _return(program: Program, names: Mapping[fx.Node, str]) -> str:
    pairs = zip(program.entry.outputs, program.output_nodes, strict=True)
    return "return " + ", ".join(f"{_name('', name)} = {names[node]}" for name, node in pairs)


def _name(sigil: str, name: str) -> str:
    return sigil + (name if BARE_NAME.fullmatch(name) else json.dumps(name))


def _reference(node: fx.Node) -> str:
    if "weight" in node.meta:
        return _name("@", node.meta["weight"])
    return _name("$", node.meta["input"]) if "input" in node.meta else _name("%", node.name)


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = _PYTHON_NAME.get(target)
    if name is None:
        raise ArtifactError.of("not_textual", f"node %{node.name} calls {target!r}, which is no aten or graphopt op")
    return name


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    values = [_print_value(value, names) for value in node.args]
    values += [f"{key}={_print_value(value, names)}" for key, value in node.kwargs.items()]
    return f"{_target(node)}({', '.join(values)})"


def _print_value(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, torch.memory_format | torch.layout):
        return str(value).removeprefix("torch.")
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(_print_value(part, names) for part in parts)})"
    if isinstance(value, tuple | list):
        inner = ", ".join(_print_value(item, names) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    raise ArtifactError.of("not_textual", f"an argument of type {type(value).__name__} has no text form: {value!r}")
