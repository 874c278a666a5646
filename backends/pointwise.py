"""Pointwise aten ops as Triton expressions: the table that says what the generator can write.

A rule has a text with operands `{0}`, `{1}`, ... and says in which dtype its operands are read: that of the result
(`result`), or their common one (`common`, comparisons). Half precision computes in float32, as eager kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.backends.index import Unfusable

aten = torch.ops.aten
prims = torch.ops.prims

TRITON: dict[torch.dtype, str] = {
    torch.float32: "tl.float32",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.int8: "tl.int8",
    torch.int16: "tl.int16",
    torch.int32: "tl.int32",
    torch.int64: "tl.int64",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
SIGNATURE = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
HALF = (torch.float16, torch.bfloat16)


def compute(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of `dtype` are computed in."""
    return torch.float32 if dtype in HALF else dtype


@dataclass(frozen=True)
class Rule:
    """How one op is written; `helper` names a function that the source must define."""

    text: str | Callable[..., str]
    reads: str = "result"
    helper: str | None = None
    floating: bool = False


HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """tanh by its exponential form; near zero, where that cancels, by a polynomial fitted on [0, 0.65]."""
    large = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    z = x * x
    p = 0.13332599401 + z * (-0.05382556841 + z * (0.02088031732 - z * 0.00593180303))
    return tl.where(tl.abs(x) < 0.6, x + x * z * (-0.33333328366 + z * p), large)
''',
}


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number as Triton text of a dtype; raises Unfusable for one that the dtype cannot hold."""
    if dtype == torch.bool:
        return "1" if value else "0"
    if dtype.is_floating_point:
        number = float(value)
        if math.isnan(number):
            return 'float("nan")'
        if math.isinf(number):
            return 'float("inf")' if number > 0 else '-float("inf")'
        return repr(number) if number >= 0 else f"({number!r})"
    if isinstance(value, float) and not value.is_integer():
        raise Unfusable(f"{value} is no {dtype}")
    info = torch.iinfo(dtype)
    if not info.min <= int(value) <= info.max:
        raise Unfusable(f"{value} is no {dtype}")
    return str(int(value)) if value >= 0 else f"({int(value)})"


def cast(text: str, before: torch.dtype, after: torch.dtype, *, explicit: bool = False) -> str:
    """`text` of dtype `before` as `after`; an explicit cast to half precision rounds."""
    source, target = compute(before), compute(after)
    if after == torch.bool:
        return text if before == torch.bool else f"({text} != 0)"
    if explicit and after in HALF and before != after:
        if not source.is_floating_point:
            text = f"{text}.to(tl.float32)"
        return f"{text}.to({TRITON[after]}).to(tl.float32)"
    return text if source == target else f"{text}.to({TRITON[target]})"


def _scaled(sign: str) -> Callable[..., str]:
    def write(a: str, b: str, alpha: str = "1") -> str:
        return f"{a} {sign} {b}" if alpha in ("1", "1.0") else f"{a} {sign} {alpha} * {b}"

    return write


def _power(a: str, b: str) -> str:
    known = {
        "2.0": f"{a} * {a}", "3.0": f"{a} * {a} * {a}", "4.0": f"({a} * {a}) * ({a} * {a})", "0.5": f"tl.sqrt({a})",
        "(-0.5)": f"1.0 / tl.sqrt({a})", "(-1.0)": f"1.0 / {a}", "(-2.0)": f"1.0 / ({a} * {a})", "1.0": a,
        "2": f"{a} * {a}", "3": f"{a} * {a} * {a}", "1": a,
    }  # fmt: skip
    if b not in known:
        raise Unfusable(f"power {b}")
    return known[b]


_MAX = "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_MIN = "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)"
_GELU_TANH = "0.5 * {0} * (1.0 + tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})))"


def _gelu(a: str, approximate: str = "none") -> str:
    return _GELU_TANH.format(a) if approximate == "tanh" else f"0.5 * {a} * (1.0 + tl.erf({a} * 0.7071067811865476))"


def _floats(text: str | Callable[..., str], helper: str | None = None) -> Rule:
    return Rule(text, helper=helper, floating=True)


RULES: dict[Any, Rule] = {
    aten.add: Rule(_scaled("+")),
    aten.sub: Rule(_scaled("-")),
    aten.mul: Rule("{0} * {1}"),
    aten.neg: Rule("-{0}"),
    aten.abs: Rule("tl.abs({0})"),
    aten.div: _floats("{0} / {1}"),
    aten.reciprocal: _floats("1.0 / {0}"),
    aten.exp: _floats("tl.exp({0})"),
    aten.exp2: _floats("tl.exp2({0})"),
    aten.log: _floats("tl.log({0})"),
    aten.log2: _floats("tl.log2({0})"),
    aten.sqrt: _floats("tl.sqrt({0})"),
    aten.rsqrt: _floats("tl.rsqrt({0})"),
    aten.sin: _floats("tl.sin({0})"),
    aten.cos: _floats("tl.cos({0})"),
    aten.tanh: _floats("tanh({0})", helper="tanh"),
    aten.erf: _floats("tl.erf({0})"),
    aten.sigmoid: _floats("1.0 / (1.0 + tl.exp(-{0}))"),
    aten.silu: _floats("{0} / (1.0 + tl.exp(-{0}))"),
    aten.gelu: _floats(_gelu, helper="tanh"),
    aten.floor: _floats("tl.floor({0})"),
    aten.ceil: _floats("tl.ceil({0})"),
    aten.relu: Rule("tl.where({0} < 0, 0, {0})"),
    aten.pow: Rule(_power),
    aten.maximum: Rule(_MAX),
    aten.minimum: Rule(_MIN),
    aten.clamp_min: Rule(_MAX),
    aten.clamp_max: Rule(_MIN),
    aten.where: Rule("tl.where({0}, {1}, {2})"),
    aten.eq: Rule("{0} == {1}", "common"),
    aten.ne: Rule("{0} != {1}", "common"),
    aten.lt: Rule("{0} < {1}", "common"),
    aten.le: Rule("{0} <= {1}", "common"),
    aten.gt: Rule("{0} > {1}", "common"),
    aten.ge: Rule("{0} >= {1}", "common"),
    aten.isnan: Rule("{0} != {0}", "common"),
    aten.logical_and: Rule("{0} & {1}", "bool"),
    aten.logical_or: Rule("{0} | {1}", "bool"),
    aten.logical_xor: Rule("{0} ^ {1}", "bool"),
    aten.logical_not: Rule("{0} == 0", "common"),
    aten.bitwise_and: Rule("{0} & {1}"),
    aten.bitwise_or: Rule("{0} | {1}"),
    aten.bitwise_xor: Rule("{0} ^ {1}"),
    aten.bitwise_right_shift: Rule("{0} >> {1}"),
    aten.bitwise_left_shift: Rule("{0} << {1}"),
    aten.__rshift__: Rule("{0} >> {1}"),
    aten.__lshift__: Rule("{0} << {1}"),
    aten.clone: Rule("{0}"),
    aten.lift_fresh_copy: Rule("{0}"),
}
CASTS = (aten._to_copy, prims.convert_element_type, aten.to)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule that writes a node, or None."""
    rule = RULES.get(getattr(node.target, "overloadpacket", None))
    if rule is None:
        return None
    overload = node.target._overloadname  # type: ignore[union-attr]
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if overload.endswith("mode") or overload in ("out", "Tensor_Tensor_mode", "Scalar_out"):
        return None
    if packet is aten.pow and overload != "Tensor_Scalar":
        return None
    if packet is aten.gelu and node.kwargs.get("approximate", "none") != "tanh":
        return Rule(rule.text, floating=True)
    if node.kwargs.keys() - {"alpha", "approximate", "memory_format"}:
        return None
    values = [node, *node.all_input_nodes]
    kinds = [v.meta["val"].dtype for v in values if isinstance(v.meta.get("val"), torch.Tensor)]
    if any(kind not in TRITON for kind in kinds):
        return None
    result = node.meta["val"].dtype
    if result == torch.bool and packet in (aten.add, aten.sub, aten.mul, aten.neg, aten.pow, aten.abs, aten.maximum,
                                           aten.minimum, aten.clamp_min, aten.clamp_max, aten.relu):  # fmt: skip
        return None
    return None if rule.floating and not result.is_floating_point else rule


def operand_dtype(rule: Rule, node: fx.Node, position: int, operands: list[Any]) -> torch.dtype:
    """The dtype that operand `position` of a node is read in."""
    result: torch.dtype = node.meta["val"].dtype
    if rule.reads == "bool" or (position == 0 and node.target is aten.where.self):
        return torch.bool
    if rule.reads == "common":
        values = [o.meta["val"] if isinstance(o, fx.Node) else o for o in operands]
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        if len(values) == 1:
            return tensors[0].dtype
        left, right = values[:2]
        common: torch.dtype = torch.result_type(_plain(left), _plain(right))
        return common
    return result


def _plain(value: Any) -> Any:
    """A stand-in with the dtype and rank that decide promotion."""
    if isinstance(value, torch.Tensor):
        return torch.empty((1,) * min(value.dim(), 1), dtype=value.dtype)
    return 1 if isinstance(value, torch.SymInt) else value
