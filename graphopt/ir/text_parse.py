"""Parsing the text form of a Program: a small grammar, known ops only, bounded sizes.

The parser trusts nothing: it knows this grammar and no Python, resolves ops by schema, and checks limits before it
allocates. Everything that reaches generated source is an identifier it checked.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.diagnostics import ArtifactError, Place, did_you_mean
from graphopt.ir.program import Dim, Entry, Input, Program
from graphopt.ir.shapes import propagate
from graphopt.ir.weights import Const, Expr, Source, TensorSource, Weight, WeightStore

VERSION = 1
MOST_CHARACTERS = 1 << 26
MOST_LINES = 1 << 19
LONGEST_LINE = 1 << 16
LONGEST_NAME = 512
DEEPEST_ARGUMENT = 12
MOST_AXES = 16
LARGEST_SIZE = 1 << 40
# Sizes are products of a few dimensions; chained squarings of Python integers would grow without bound.
WIDEST_INTEGER = 1024

_SHORT = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32",
    "int16": "i16", "int8": "i8", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64",
    "complex64": "c64", "complex128": "c128",
}  # fmt: skip
DTYPE_NAMES = {
    value: _SHORT.get(str(value).removeprefix("torch."), str(value).removeprefix("torch."))
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_DTYPE_OF = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ENUMS = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.memory_format | torch.layout)
}
_WORDS: dict[str, Any] = {
    "True": True, "False": False, "None": None, "inf": math.inf, "nan": math.nan, "device": torch.device("cpu"),
    **_ENUMS, **_DTYPE_OF,
}  # fmt: skip
PYTHON_OPS = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge",
            "and_", "or_", "not_",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{
        f"torch.sym_{name}": getattr(torch, f"sym_{name}")
        for name in ("int", "float", "max", "min", "not", "ite", "sum", "sqrt")
        if hasattr(torch, f"sym_{name}")
    },
}  # fmt: skip
# Private aten kernels skip bounds checks that their public fronts make; these are the ones that captures need.
_PRIVATE = {"_to_copy", "_softmax", "_log_softmax", "_unsafe_view", "_grouped_mm", "_scaled_grouped_mm", "_weight_norm"}
# The one op that writes into an argument: into inputs that the caller gave for it.
_WRITERS = {torch.ops.graphopt.cached_attention.default}
# Strings select a variant of an op and never name a file (aten::from_file does).
_STRING_ARGUMENTS = {
    "approximate", "equation", "indexing", "interpolation", "mode", "norm", "ord", "padding", "padding_mode", "reduce",
    "rounding_mode", "side",
}  # fmt: skip
_RETURN_TYPES = {"Tensor", "int", "SymInt", "float", "SymFloat", "bool", "SymBool", "number", "Scalar"}
_ARGUMENT_TYPES = _RETURN_TYPES | {"complex", "Device", "ScalarType", "Layout", "MemoryFormat", "Generator"}
BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)
    | (?P<float>-?\d+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+) | -inf)
    | (?P<int>-?\d+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<ref>[%@$](?:[A-Za-z_][A-Za-z0-9_.]*|"(?:[^"\\]|\\.)*"))
    | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<mark>\.\.|[()\[\],=])
    | (?P<comment>\#.*)
    | (?P<other>.)""",
    re.VERBOSE,
)


def parse_program(
    text: str, constants: Mapping[str, torch.Tensor], source: TensorSource | None, file: str = "graph.txt"
) -> Program:
    """Parse what `print_program` printed; `constants` holds the values of constant weights, `source` the others.

    Raises ArtifactError with line and column at unknown ops, bad syntax, broken limits or ill-typed nodes.
    """
    if len(text) > MOST_CHARACTERS or text.count("\n") > MOST_LINES:
        raise ArtifactError.of("too_large", f"{file} has {len(text)} characters, the limit is {MOST_CHARACTERS}")
    return _Parser(file, constants, source).parse(text)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    col: int


class _Line:
    """The tokens of one line and where the parser stands in them."""

    def __init__(self, file: str, number: int, source: str) -> None:
        self.file, self.number, self.source, self.at, self.depth = file, number, source, 0, 0
        if len(source) > LONGEST_LINE:
            self.source = source[:LONGEST_NAME]
            raise self.error("too_large", f"a line of {len(source)} characters, the limit is {LONGEST_LINE}")
        matches = _TOKEN.finditer(source)
        self.tokens = [_Token(m.lastgroup or "", m[0], m.start() + 1) for m in matches if m.lastgroup != "space"]
        self.comment = self.tokens.pop().text if self.tokens and self.tokens[-1].kind == "comment" else None
        self.tokens.append(_Token("end", "", len(source) + 1))

    def error(self, code: str, message: str, token: _Token | None = None, help: tuple[str, ...] = ()) -> ArtifactError:
        col, length = (token.col, len(token.text)) if token else (1, 1)
        return ArtifactError.of(code, message, Place(self.file, self.number, col, length, self.source), help=help)

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def take(self, *kinds: str, wanted: str | None = None) -> _Token:
        token = self.next
        if token.kind not in kinds:
            raise self.error("bad_graph", f"expected {wanted or ' or '.join(kinds)}, found {_shown(token)}", token)
        self.at += 1
        return token

    def mark(self, text: str) -> _Token:
        if self.next.text != text or self.next.kind not in ("mark", "word"):
            raise self.error("bad_graph", f"expected {text!r}, found {_shown(self.next)}", self.next)
        self.at += 1
        return self.tokens[self.at - 1]

    def skip(self, text: str) -> bool:
        found = self.next.text == text and self.next.kind in ("mark", "word")
        self.at += found
        return found

    def integer(self, high: int) -> int:
        token = self.take("int")
        if len(token.text) > 20 or not 0 <= int(token.text) <= high:
            raise self.error("too_large", f"expected an integer in 0..{high}", token)
        return int(token.text)

    def ref(self, sigil: str) -> tuple[str, _Token]:
        token = self.take("ref", wanted=f"a name that begins with {sigil!r}")
        if token.text[0] != sigil:
            raise self.error("bad_graph", f"expected a name that begins with {sigil!r}", token)
        return self.unquoted(token, token.text[1:]), token

    def unquoted(self, token: _Token, text: str) -> str:
        try:
            name = json.loads(text) if text.startswith('"') else text
        except json.JSONDecodeError as error:
            raise self.error("bad_graph", "bad escape in a string", token) from error
        if len(name) > LONGEST_NAME:
            raise self.error("too_large", f"a name of {len(name)} characters, the limit is {LONGEST_NAME}", token)
        return str(name)

    def dtype(self) -> torch.dtype:
        token = self.take("word", wanted="a dtype")
        if token.text not in _DTYPE_OF:
            raise self.error("bad_graph", f"{token.text!r} is no dtype", token, did_you_mean(token.text, _DTYPE_OF))
        return _DTYPE_OF[token.text]

    def end(self) -> None:
        self.take("end", wanted="the end of the line")


def _shown(token: _Token) -> str:
    return "the end of the line" if token.kind == "end" else repr(token.text)


class _Parser:
    """One pass over the lines: declarations, calls, return."""

    def __init__(self, file: str, constants: Mapping[str, torch.Tensor], source: TensorSource | None) -> None:
        self.file, self.constants, self.source = file, constants, source
        self.dtype: torch.dtype | None = None
        self.dims: dict[str, Dim] = {}
        self.inputs: list[Input] = []
        self.weights: dict[str, Weight] = {}
        self.read: list[str] = []
        self.targets: set[str] = set()
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.bits: dict[fx.Node, int] = {}
        self.lines: dict[str, _Line] = {}
        self.started = False
        self.outputs: tuple[str, ...] | None = None

    def parse(self, text: str) -> Program:
        rows = text.split("\n")
        first = _Line(self.file, 1, rows[0])
        first.mark("graphopt")
        if first.integer(1 << 20) != VERSION:
            raise first.error("bad_version", f"this graphopt reads version {VERSION} of the text form")
        for number, row in enumerate(rows[1:], 2):
            if row.strip():
                self._line(_Line(self.file, number, row))
        if self.outputs is None or self.dtype is None:
            raise _Line(self.file, len(rows), "").error("bad_graph", "the text ends without a return or a dtype line")
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        store = WeightStore(self.weights, self.source)
        entry = Entry(tuple(self.inputs), self.outputs)
        dims = tuple(self.dims.values())
        try:
            propagate(module, store, dims, entry)
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", ()))
            name = re.search(r"node (%\w+)", notes)
            line = self.lines.get(name[1]) if name else None
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if line is None:
                raise ArtifactError.of("bad_graph", f"{self.file} is not well typed: {reason}") from error
            raise line.error("bad_graph", f"this call is not well typed: {reason}") from error
        return Program(module, store, dims, entry, self.dtype)

    def _line(self, line: _Line) -> None:
        if self.outputs is not None:
            raise line.error("bad_graph", "nothing may follow the return line")
        token = line.next
        if token.kind == "ref":
            return self._node(line)
        handler = {
            "dtype": self._dtype, "dim": self._dim, "input": self._input, "weight": self._weight,
            "return": self._return,
        }.get(token.text)  # fmt: skip
        if handler is None:
            raise line.error("bad_graph", f"a line cannot begin with {_shown(token)}", token)
        if self.started and token.text != "return":
            raise line.error("bad_graph", "declarations come before the first call", token)
        line.at += 1
        handler(line)
        line.end()

    def _dtype(self, line: _Line) -> None:
        self.dtype = line.dtype()

    def _dim(self, line: _Line) -> None:
        token = line.take("word", wanted="a dimension name")
        if not _IDENTIFIER.fullmatch(token.text) or token.text in self.dims or len(token.text) > LONGEST_NAME:
            raise line.error("bad_graph", f"{token.text!r} is no new dimension name", token)
        low = line.integer(LARGEST_SIZE)
        line.mark("..")
        high = line.integer(LARGEST_SIZE)
        line.mark("hint")
        hint = line.integer(high)
        # A size of 1 is propagated as a number and no longer as the dimension.
        if not 0 < low <= hint or hint < 2:
            raise line.error("bad_graph", "a dimension needs 1 <= low <= hint <= high and a hint of 2 or more", token)
        self.dims[token.text] = Dim(token.text, low, high, hint)

    def _sizes(self, line: _Line, *, named: bool) -> tuple[Any, ...]:
        line.mark("[")
        sizes: list[str | int] = []
        while not line.skip("]"):
            if sizes:
                line.mark(",")
            if named and line.next.kind == "word":
                token = line.take("word")
                if token.text not in self.dims:
                    raise line.error(
                        "bad_graph", f"unknown dimension {token.text!r}", token, did_you_mean(token.text, self.dims)
                    )
                sizes.append(token.text)
            else:
                sizes.append(line.integer(LARGEST_SIZE))
            if len(sizes) > MOST_AXES:
                raise line.error("too_large", f"more than {MOST_AXES} axes", line.next)
        return tuple(sizes)

    def _input(self, line: _Line) -> None:
        name, token = line.ref("$")
        dtype = line.dtype()
        shape = self._sizes(line, named=True)
        role = line.take("word", wanted="a role")
        if not _IDENTIFIER.fullmatch(role.text) or not _IDENTIFIER.fullmatch(name):
            raise line.error("bad_graph", "inputs and roles are identifiers", token)
        if any(known.name == name for known in self.inputs):
            raise line.error("bad_graph", f"input {name!r} is declared twice", token)
        self.inputs.append(Input(name, shape, dtype, role.text))

    def _weight(self, line: _Line) -> None:
        name, token = line.ref("@")
        kind = line.take("word", wanted="parameter, buffer or constant")
        if kind.text not in ("parameter", "buffer", "constant"):
            raise line.error("bad_graph", "a weight is a parameter, buffer or constant", kind)
        dtype = line.dtype()
        shape = self._sizes(line, named=False)
        aliases: list[str] = []
        if line.skip("aliases"):
            aliases.append(line.ref("@")[0])
            while line.skip(","):
                aliases.append(line.ref("@")[0])
        expr: Expr = Source(name, shape, dtype)
        if kind.text == "constant":
            value = self.constants.get(name)
            if value is None or tuple(value.shape) != shape or value.dtype != dtype:
                found = "missing" if value is None else f"{DTYPE_NAMES[value.dtype]}{list(value.shape)}"
                raise line.error("bad_constant", f"the value of constant {name!r} is {found}", token)
            expr = Const(value, dtype)
        if name in self.weights:
            raise line.error("bad_graph", f"{name!r} is declared twice", token)
        self.weights[name] = Weight(name, expr, kind.text, tuple(aliases))
        if not line.skip("unread"):
            self.read.append(name)

    def _begin(self) -> None:
        """Placeholders: weights in the order of their lines, then inputs, as a program has them."""
        self.started = True
        for name in self.read:
            self._placeholder(f"@{name}", name.replace(".", "_"), {"weight": name})
        for spec in self.inputs:
            self._placeholder(f"${spec.name}", spec.name, {"input": spec.name})

    def _placeholder(self, key: str, name: str, meta: dict[str, Any]) -> None:
        # A placeholder's target becomes a parameter name in generated source as it stands.
        safe = re.sub(r"[^A-Za-z0-9_]", "_", name)
        safe = safe if _IDENTIFIER.fullmatch(safe) and not keyword.iskeyword(safe) else f"w_{safe}"
        while safe in self.targets:
            safe += "_"
        self.targets.add(safe)
        node = self.graph.placeholder(safe)
        node.meta.update(meta)
        self.values[key] = node
        self.bits[node] = 64

    def _node(self, line: _Line) -> None:
        if not self.started:
            self._begin()
        name, token = line.ref("%")
        if not _IDENTIFIER.fullmatch(name) or f"%{name}" in self.values:
            raise line.error("bad_graph", f"{name!r} is no new node name", token)
        line.mark("=")
        called = line.take("word", wanted="an op")
        target = _resolve(line, called)
        line.mark("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not line.skip(")"):
            if args or kwargs:
                line.mark(",")
            if line.next.kind == "word" and line.tokens[line.at + 1].text == "=":
                key = line.take("word")
                line.mark("=")
                # Keywords are written into generated source as they stand.
                if not _has_argument(target, key.text) or key.text in kwargs:
                    raise line.error("bad_graph", f"{called.text} takes no argument {key.text!r} here", key)
                kwargs[key.text] = self._value(line, target, key.text)
            elif kwargs:
                raise line.error("bad_graph", "positional arguments come before named ones", line.next)
            else:
                args.append(self._value(line, target, _argument_name(target, len(args))))
        line.end()
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name)
        if line.comment is not None:
            path = line.comment.removeprefix("#").strip()
            node.meta["path"] = line.unquoted(token, f'"{path}"')
        self.bits[node] = self._width(line, token, called.text, args)
        self.values[f"%{name}"] = node
        self.lines[f"%{node.name}"] = line

    def _width(self, line: _Line, token: _Token, called: str, args: list[Any]) -> int:
        """An upper bound on the bits of an integer result, so that no chain of products can explode."""
        if not called.startswith("operator."):
            return 64
        parts = [self.bits[a] if isinstance(a, fx.Node) else 64 for a in args]
        width = sum(parts) if called == "operator.mul" else max(parts, default=0) + 1
        if width > WIDEST_INTEGER and called != "operator.getitem":
            raise line.error("too_large", "a chain of products of sizes that is too long", token)
        return 64 if called == "operator.getitem" else width

    def _value(self, line: _Line, target: Any, argument: str | None) -> Any:
        token = line.take("ref", "int", "float", "string", "word", "mark", wanted="a value")
        if token.kind == "ref":
            name = line.unquoted(token, token.text[1:])
            node = self.values.get(token.text[0] + name)
            if node is None:
                raise line.error("bad_graph", f"{token.text} is not defined above", token)
            return node
        if token.kind == "int":
            if len(token.text) > 20:
                raise line.error("too_large", "an integer of more than 64 bits", token)
            return int(token.text)
        if token.kind == "float":
            return float(token.text)
        if token.kind == "string":
            if argument not in _STRING_ARGUMENTS:
                raise line.error("bad_graph", "a string is not allowed for this argument", token)
            return line.unquoted(token, token.text)
        if token.kind == "word" and token.text == "slice":
            line.mark("(")
            parts = self._items(line, target, argument, ")")
            if len(parts) != 3:
                raise line.error("bad_graph", "a slice has start, stop and step", token)
            return slice(*parts)
        if token.kind == "word":
            if token.text not in _WORDS:
                raise line.error("bad_graph", f"unknown word {token.text!r}", token, did_you_mean(token.text, _WORDS))
            return _WORDS[token.text]
        if token.text not in ("[", "("):
            raise line.error("bad_graph", f"expected a value, found {_shown(token)}", token)
        items = self._items(line, target, argument, "]" if token.text == "[" else ")")
        return items if token.text == "[" else tuple(items)

    def _items(self, line: _Line, target: Any, argument: str | None, close: str) -> list[Any]:
        line.depth += 1
        if line.depth > DEEPEST_ARGUMENT:
            raise line.error("too_large", f"arguments nest deeper than {DEEPEST_ARGUMENT}", line.next)
        items: list[Any] = []
        while not line.skip(close):
            if items:
                line.mark(",")
                if line.skip(close):
                    break
            items.append(self._value(line, target, argument))
        line.depth -= 1
        return items

    def _return(self, line: _Line) -> None:
        if not self.started:
            self._begin()
        names: list[str] = []
        nodes: list[fx.Node] = []
        while not names or line.skip(","):
            token = line.take("word", "string", wanted="the name of a result")
            names.append(line.unquoted(token, token.text))
            line.mark("=")
            value = self._value(line, None, None)
            if not isinstance(value, fx.Node):
                raise line.error("bad_graph", "only nodes can be returned", token)
            nodes.append(value)
        self.graph.output(tuple(nodes))
        self.outputs = tuple(names)


def _resolve(line: _Line, token: _Token) -> Any:
    """The op that a name means, when it is one that programs may call; never an attribute of anything else."""
    if token.text in PYTHON_OPS:
        return PYTHON_OPS[token.text]
    parts = token.text.split(".")
    if len(parts) == 3 and parts[0] in ("aten", "graphopt") and all(map(_IDENTIFIER.fullmatch, parts)):
        namespace, name, overload = parts
        private = name.startswith("_") and name not in _PRIVATE
        packet = None if private or "__" in token.text else getattr(getattr(torch.ops, namespace), name, None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and overload in packet.overloads():
            op = getattr(packet, overload)
            if (not op._schema.is_mutable or op in _WRITERS) and _tensor_op(op):
                return op
    raise line.error("unknown_op", f"{token.text!r} is no op that a program may call", token)


def _tensor_op(op: Any) -> bool:
    """Whether the schema is about tensors and numbers alone: no dictionaries or storages, strings only as variants."""
    for argument in op._schema.arguments:
        kind = _element(argument.type)
        if kind == "str" and argument.name in _STRING_ARGUMENTS:
            continue
        if kind not in _ARGUMENT_TYPES:
            return False
    return all(_element(value.type) in _RETURN_TYPES for value in op._schema.returns)


def _element(kind: Any) -> str:
    return re.sub(r"Optional\[|List\[|\]", "", str(kind))


def _has_argument(target: Any, name: str) -> bool:
    return isinstance(target, torch._ops.OpOverload) and any(a.name == name for a in target._schema.arguments)


def _argument_name(target: Any, position: int) -> str | None:
    if not isinstance(target, torch._ops.OpOverload) or position >= len(target._schema.arguments):
        return None
    return str(target._schema.arguments[position].name)
