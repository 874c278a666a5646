"""The sizes that a capture holds for: read from what torch.export refuses, and from the guards of what it accepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from graphopt.ir.program import Dim, Input

_RANGE = re.compile(r"^\s*(\w+) = Dim\('(\w+)'(?:, min=(\d+))?(?:, max=(\d+))?\)", re.MULTILINE)
_FIXED = re.compile(r"^\s*(\w+) = (\d+)\s*$", re.MULTILINE)
_SOURCE = re.compile(r"^L\['(\w+)'\]\.size\(\)\[(\d+)\]$")
_DENSE = 640


def is_constraint(error: BaseException) -> bool:
    """Whether torch.export refused the dimensions, not the model."""
    text = str(error)
    return "Constraints violated" in text or "Specializations unexpectedly required" in text


def suggested(error: BaseException, dims: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """The dimensions with the ranges that torch.export suggests, or None when it suggests no range."""
    found = {m[1]: (m[3], m[4]) for m in _RANGE.finditer(str(error))}
    made = []
    for dim in dims:
        low, high = found.get(dim.name, (None, None))
        # Export writes the lower bound 2 for "not specialised", which 1 need not break.
        least = int(low) if low is not None and int(low) > 2 else dim.low
        made.append(within(dim, max(dim.low, least), min(dim.high, int(high) if high is not None else dim.high)))
    return None if tuple(made) == dims else tuple(made)


def fixed(error: BaseException, dims: tuple[Dim, ...], *, said: bool) -> tuple[Dim, ...] | None:
    """The dimensions with those fixed at their hints that a model specialises, or None.

    With `said` only those for which torch.export names the size, else all that it complains of.
    """
    text = str(error)
    names = {m[1] for m in _FIXED.finditer(text)} & {dim.name for dim in dims if dim.low < dim.high}
    if not names and not said:
        named = re.search(r"(?:Constraints violated|unexpectedly required) \(([\w, ]+)\)", text)
        given = {name.strip() for name in named[1].split(",")} if named else set()
        names = given & {dim.name for dim in dims if dim.low < dim.high}
    if not names:
        return None
    return tuple(replace(dim, low=dim.hint, high=dim.hint) if dim.name in names else dim for dim in dims)


def within(dim: Dim, low: int, high: int) -> Dim:
    """`dim` with a range, and a hint inside it."""
    hint = dim.hint if low <= dim.hint <= high else max(low, high // 2 + 1)
    return replace(dim, low=low, high=max(low, high), hint=hint)


def guarded(exported: Any, specs: Sequence[Input], dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The dimensions narrowed to where every guard and deferred assertion of an export holds.

    Each condition is evaluated at every size up to 640 and at powers of two and their neighbours beyond; the range kept
    is the one around the hint without a size where it is false.
    """
    env = _shape_env(exported)
    if env is None:
        return dims
    conditions = [guard.expr for guard in env.guards]
    conditions += [claim.expr for claims in env.deferred_runtime_asserts.values() for claim in claims]
    shapes = {spec.name: spec.shape for spec in specs}
    symbols: dict[Any, str] = {}
    for symbol, sources in env.var_to_sources.items():
        for source in sources:
            name = source.name() if callable(source.name) else source.name
            match = _SOURCE.match(name)
            size = shapes[match[1]][int(match[2])] if match and match[1] in shapes else None
            if isinstance(size, str):
                symbols[symbol] = size
    by_name = {dim.name: dim for dim in dims}
    for condition in dict.fromkeys(conditions):
        named = {symbols.get(symbol) for symbol in condition.free_symbols}
        if None in named:
            continue
        for name in sorted(n for n in named if n is not None):

            def holds(size: int, condition: Any = condition, name: str = name) -> bool:
                sizes = {s: size if symbols[s] == name else by_name[symbols[s]].hint for s in condition.free_symbols}
                return bool(condition.xreplace({s: _integer(v) for s, v in sizes.items()}))

            if _same(condition, symbols):
                continue
            dim = by_name[name]
            by_name[name] = within(dim, *_around(dim, holds))
    return tuple(by_name[dim.name] for dim in dims)


def _same(condition: Any, symbols: dict[Any, str]) -> bool:
    """Whether a condition only says that two inputs share a dimension, which the calling convention says already."""
    return (
        len(condition.args) == 2
        and all(arg in symbols for arg in condition.args)
        and (symbols[condition.args[0]] == symbols[condition.args[1]])
    )


def _integer(value: int) -> Any:
    import sympy

    return sympy.Integer(value)


def _around(dim: Dim, holds: Callable[[int], bool]) -> tuple[int, int]:
    if not holds(dim.hint):
        return dim.low, dim.high  # A condition on other sizes than these: the comparison with eager decides.
    edges = {edge + step for edge in (1 << p for p in range(24)) for step in (-1, 0, 1)}
    sizes = sorted(s for s in {*range(1, _DENSE), *edges, dim.low, dim.high} if dim.low <= s <= dim.high)
    low, high = dim.low, dim.high
    for size in reversed([s for s in sizes if s < dim.hint]):
        if not holds(size):
            low = size + 1
            break
    last = dim.hint
    for size in (s for s in sizes if s > dim.hint):
        if not holds(size):
            high = _last_true(last, size, holds)
            break
        last = size
    return low, high


def _last_true(good: int, bad: int, holds: Callable[[int], bool]) -> int:
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good


def _shape_env(exported: Any) -> Any:
    for node in exported.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None
