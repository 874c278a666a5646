"""A generated kernel: its source, what it reads and writes, and the launch function that is written with it."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from graphopt.backends.emit import Emitter
from graphopt.backends.index import Size, Unfusable, product, text_of
from graphopt.backends.index import sizes_of as raw_sizes
from graphopt.backends.pointwise import SIGNATURE


@dataclass(frozen=True)
class Entry:
    """One Triton function of a source: argument names with their types, and compile-time arguments with values to check."""

    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int = 4


Scalar: TypeAlias = fx.Node | tuple[fx.Node, int]


@dataclass(frozen=True)
class Kernel:
    """Generated source whose `launch(*inputs, *sizes)` returns the outputs.

    `inputs` are nodes in the order of the launch arguments, `scalars` what gives sizes that no input's shape shows: a
    node that is a size, or the axis of an argument of the graph.
    """

    template: str
    source: str
    inputs: tuple[fx.Node, ...]
    scalars: tuple[Scalar, ...]
    outputs: tuple[fx.Node, ...]
    entries: tuple[Entry, ...]
    nodes: frozenset[fx.Node] = field(default=frozenset(), compare=False)

    @property
    def digest(self) -> str:
        """What names the kernel: a hash of its source."""
        return hashlib.sha256(self.source.encode()).hexdigest()[:16]


@dataclass
class Signature:
    """The arguments of one kernel, gathered from what its emitter read and what it writes."""

    emitter: Emitter
    outputs: Sequence[fx.Node]
    out_names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.out_names = [f"out{i}" for i in range(len(self.outputs))]
        for node in self.outputs:
            for size in self.emitter.sizes(node):
                text_of(size)

    @property
    def names(self) -> list[str]:
        """Argument names in order: inputs, outputs, strides, sizes."""
        e = self.emitter
        return [
            *e.inputs.values(),
            *self.out_names,
            *(s for s, _, _ in e.strides),
            *(str(s) for s in e.symbols.values()),
        ]

    def types(self) -> tuple[tuple[str, str], ...]:
        """Triton's types of the arguments."""
        pointers = [*self.emitter.inputs, *self.outputs]
        kinds = [f"*{SIGNATURE[node.meta['val'].dtype]}" for node in pointers]
        return tuple(zip(self.names, [*kinds, *["i32"] * (len(self.names) - len(kinds))], strict=True))

    def scalars(self) -> tuple[list[Scalar], list[str]]:
        """Size nodes to pass, and the lines of the launch that bind every size."""
        e = self.emitter
        lines: list[str] = []
        extra: list[Scalar] = []
        for symbol, name in e.symbols.items():
            place = _shown(symbol, e.inputs)
            if place is not None:
                lines.append(f"{name} = {place}")
                continue
            node = _scalar(symbol, e)
            if node is None:
                raise Unfusable(f"no argument shows the size {symbol}")
            extra.append(node)
            lines.append(f"{name} = size{len(extra) - 1}")
        return extra, lines

    def launch(self, body: Sequence[str], defaults: str) -> tuple[str, tuple[Scalar, ...]]:
        """The launch function around `body`, which starts the kernel, and the size nodes that it takes."""
        e = self.emitter
        extra, lines = self.scalars()
        arguments = [*e.inputs.values(), *(f"size{i}" for i in range(len(extra)))]
        text = [f"def launch({', '.join(arguments)}{', ' if arguments else ''}{defaults}):"]
        for node, name in e.inputs.items():
            if node.meta["val"].is_contiguous() and node.meta["val"].dim() and node not in e.written_inputs:
                lines.append(f"{name} = {name}.contiguous()")
        lines += [f"{name} = {e.inputs[node]}.stride({axis})" for name, node, axis in e.strides if node in e.inputs]
        device = f"{next(iter(e.inputs.values()))}.device" if e.inputs else '"cpu"'
        for node, name in zip(self.outputs, self.out_names, strict=True):
            lines.append(f"{name} = {_allocation(e, node, device)}")
            lines += [f"{s} = {name}.stride({axis})" for s, n, axis in e.strides if n is node]
        lines += body
        lines.append(f"return {', '.join(self.out_names)}")
        text += [f"    {line}" for line in lines]
        return "\n".join(text) + "\n", tuple(extra)


def _shown(symbol: sympy.Symbol, inputs: dict[fx.Node, str]) -> str | None:
    for node, name in inputs.items():
        for axis, size in enumerate(raw_sizes(node.meta["val"])):
            if size == symbol:
                return f"{name}.shape[{axis}]"
    return None


def _scalar(symbol: sympy.Symbol, emitter: Emitter) -> Scalar | None:
    """An argument of the graph that is the size, or whose shape shows it."""
    for node in next(iter(emitter.inside)).graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node  # type: ignore[no-any-return]
        if isinstance(value, torch.Tensor) and symbol in raw_sizes(value):
            return node, raw_sizes(value).index(symbol)
    return None


def _allocation(emitter: Emitter, node: fx.Node, device: str) -> str:
    value = node.meta["val"]
    sizes = emitter.sizes(node)
    shape = f"({', '.join(text_of(s) for s in sizes)}{',' if len(sizes) == 1 else ''})"
    if value.is_contiguous():
        return f"torch.empty({shape}, dtype={value.dtype}, device={device})"
    order = dense_order(value)
    if order is None:
        raise Unfusable("an output whose strides leave holes")
    strides: list[Size] = [1] * len(sizes)
    step: Size = 1
    for axis in order:
        strides[axis] = step
        step = step * sizes[axis]
    return f"torch.empty_strided({shape}, ({', '.join(text_of(s) for s in strides)},), dtype={value.dtype}, device={device})"


def dense_order(value: torch.Tensor) -> list[int] | None:
    """Axes from the innermost outwards when a tensor fills its memory without holes, else None."""
    sizes, strides = raw_sizes(value), [s if isinstance(s, int) else s.node.expr for s in value.stride()]
    left = [axis for axis in range(len(sizes)) if sizes[axis] != 1]
    order, step = [axis for axis in range(len(sizes)) if sizes[axis] == 1], sympy.Integer(1)
    while left:
        axis = next((a for a in reversed(left) if sympy.expand(strides[a] - step) == 0), None)
        if axis is None:
            return None
        order.append(axis)
        left.remove(axis)
        step = sympy.sympify(product([step, sizes[axis]]))
    return order


HEADER = "import torch\nimport triton\nimport triton.language as tl\n"


def assemble(title: Sequence[str], helpers: Sequence[str], functions: Sequence[str], launch: str) -> str:
    """One readable file."""
    words = '"""' + "\n".join(title).strip() + '\n"""\n'
    return "\n\n".join([words + "\n" + HEADER, *helpers, *functions, launch])


def describe(nodes: Sequence[fx.Node], emitter: Emitter, outputs: Sequence[fx.Node]) -> list[str]:
    """The head of a source: ops in order, and what it reads and writes."""
    ops = [str(node.target).removesuffix(".default") for node in nodes]
    lines = [", ".join(ops) + "."]

    def shape(node: fx.Node) -> str:
        sizes = ", ".join(text_of(s).strip("()") for s in emitter.sizes(node))
        return f"[{sizes}] {str(node.meta['val'].dtype).removeprefix('torch.')}"

    lines += ["", *(f"{name}: {shape(node)}" for node, name in emitter.inputs.items())]
    lines += [f"out{i}: {shape(node)}" for i, node in enumerate(outputs)]
    return _wrapped(lines)


def kernel_text(name: str, arguments: Sequence[str], body: Sequence[str]) -> str:
    """A Triton function; what it takes is wrapped as a reader would."""
    head = f"def {name}({', '.join(arguments)}):"
    if len(head) > 118:
        inner = textwrap.wrap(", ".join(arguments) + ",", 112)
        head = "\n".join([f"def {name}(", *(f"    {line}" for line in inner), "):"])
    return "\n".join(["@triton.jit", head, *(f"    {line}" for line in body)]) + "\n"


def call_text(function: str, arguments: str) -> list[str]:
    """The lines of a call."""
    if len(function) + len(arguments) < 108:
        return [f"{function}({arguments})"]
    return [f"{function}(", *(f"    {line}" for line in textwrap.wrap(arguments + ",", 108)), ")"]


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [piece for line in lines for piece in (textwrap.wrap(line, 116, subsequent_indent="  ") or [""])]
