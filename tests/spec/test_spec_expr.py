from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from graphopt.spec import Expr, ScalarError

DIMS = {"heads": 32, "kv_heads": 8, "neurons": 11008}


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("heads / 4", 8),
        ("max(1, kv_heads - 2)", 6),
        ("round_to(0.75 * neurons, 32)", 8256),
        ("round_to(48, 32)", 64),
        ("floor(heads / 3)", 10),
        ("ceil(heads / 3)", 11),
        ("min(heads, kv_heads, 5)", 5),
        ("-heads + 40", 8),
        ("(2 ** 3) ** 2", 64),
        ("heads // 5 % 4", 2),
        ("0.1 + 0.2", Fraction(3, 10)),
        (7, 7),
        (0.75, Fraction(3, 4)),
        ("  heads ", 32),
    ],
)
def test_expressions_are_exact(source: object, wanted: Fraction) -> None:
    assert Expr.parse(source).evaluate(DIMS) == wanted


@pytest.mark.parametrize(
    ("source", "message", "start", "length"),
    [
        ("9**9**9", "the exponent 9**9 is not a number from 0 to 16", 3, 4),
        ("2 ** heads", "the exponent heads is not a number from 0 to 16", 5, 5),
        ("__import__('os')", "'__import__' is not a dimension or a function", 0, 10),
        ("heads.real", "'.' is not allowed in an expression", 5, 1),
        ("heads[0]", "'[' is not allowed in an expression", 5, 1),
        ("roundto(1, 2)", "unknown function 'roundto'", 0, 7),
        ("1000000000", "1000000000 is too large (at most 999999999)", 0, 10),
        ("heads if 1 else 2", "'heads if 1 else 2' is not arithmetic", 0, 17),
        ("1 and 2", "'1 and 2' is not arithmetic", 0, 7),
        ("True", "'True' is not arithmetic", 0, 4),
        ("lambda", "'lambda' is not an expression: invalid syntax", 0, 1),
        ("(heads", "'(heads' is not an expression: '(' was never closed", 0, 1),
        ("floor(1, 2)", "floor takes 1 values, not 2", 0, 11),
        ("min(heads)", "min takes 2 to 8 values, not 1", 0, 10),
        ("floor", "'floor' is a function: write floor(...)", 0, 5),
        ("2heads", "'heads' directly after a number", 1, 5),
        ("heads, 2", "'heads, 2' is not arithmetic", 0, 8),
        ("1+" * 150 + "1", "an expression of 301 characters (at most 200)", 0, 301),
        ("head\u0455", "'\u0455' is not allowed in an expression", 4, 1),
    ],
)
def test_refusals_name_the_token(source: str, message: str, start: int, length: int) -> None:
    with pytest.raises(ScalarError) as caught:
        Expr.parse(source)
    assert caught.value.diagnostics[0].message == message
    assert (caught.value.start, caught.value.length) == (start, length)


@pytest.mark.parametrize("value", [True, None, [1], math.inf, math.nan])
def test_other_values_are_not_expressions(value: object) -> None:
    with pytest.raises(ScalarError):
        Expr.parse(value)


def test_depth_is_bounded() -> None:
    Expr.parse("1" + "+1" * 19)
    for source in ("1" + "+1" * 20, "-" * 30 + "1", "floor(" * 25 + "1" + ")" * 25):
        with pytest.raises(ScalarError, match="nested deeper than 20 operations"):
            Expr.parse(source)


def test_towers_of_small_exponents_stop_before_they_are_computed() -> None:
    with pytest.raises(ScalarError, match="the value is too large"):
        Expr.parse("((((9**16)**16)**16)**16)**16").evaluate({})


def test_a_value_that_must_be_an_integer_says_its_value() -> None:
    assert Expr.parse("heads / 4").integer(DIMS) == 8
    with pytest.raises(ScalarError) as caught:
        Expr.parse("heads / 5").integer(DIMS)
    assert str(caught.value) == (
        "error: 'heads / 5' is 6.4, not an integer  [not_an_integer]\n"
        "      = with heads = 32\n"
        "      = help: use floor(...), ceil(...) or round_to(..., multiple)"
    )
    with pytest.raises(ScalarError, match=r"is 32/3 \(about 10.66666667\), not an integer"):
        Expr.parse("heads / 3").integer(DIMS)


def test_an_unknown_dimension_lists_the_known_ones() -> None:
    with pytest.raises(ScalarError) as caught:
        Expr.parse("2 * haeds").evaluate(DIMS)
    assert str(caught.value) == (
        "error: unknown dimension 'haeds'  [unknown_dimension]\n"
        "      = dimensions: heads, kv_heads, neurons\n"
        "      = help: did you mean 'heads'?"
    )
    assert (caught.value.start, caught.value.length) == (4, 5)


@pytest.mark.parametrize("source", ["1 / (heads - 32)", "1 // 0", "1 % 0", "round_to(1, 0)"])
def test_division_by_zero_is_an_error(source: str) -> None:
    with pytest.raises(ScalarError, match="division by zero"):
        Expr.parse(source).evaluate(DIMS)


def sources(names: list[str]) -> st.SearchStrategy[str]:
    leaves = st.one_of(st.integers(0, 999).map(str), st.sampled_from(names))

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        infix = st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        call = st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
        return st.one_of(infix, call, inner.map(lambda s: f"-{s}"), inner.map(lambda s: f"floor({s})"))

    return st.recursive(leaves, extend, max_leaves=8).filter(lambda s: len(s) <= 200)


@given(sources(["a", "b"]), st.integers(1, 99), st.integers(1, 99))
def test_evaluation_is_fraction_arithmetic(source: str, a: int, b: int) -> None:
    scope = {"a": Fraction(a), "b": Fraction(b), "min": min, "max": max, "floor": lambda x: Fraction(math.floor(x))}
    in_fractions = "".join(f"F({token})" if token.isdigit() else token for token in _split(source))
    try:
        wanted = eval(in_fractions, {"F": Fraction, **scope})
    except ZeroDivisionError:
        with pytest.raises(ScalarError, match="division by zero"):
            Expr.parse(source).evaluate({"a": a, "b": b})
        return
    assert Expr.parse(source).evaluate({"a": a, "b": b}) == wanted


def _split(source: str) -> list[str]:
    import re

    return re.findall(r"[0-9]+|[^0-9]+", source)


@given(st.text(max_size=60))
def test_any_text_is_an_expression_or_a_scalar_error(source: str) -> None:
    try:
        Expr.parse(source)
    except ScalarError as error:
        start = error.start
    else:
        start = 0
    assert 0 <= start <= len(source)


@pytest.mark.parametrize(
    "source", ["round_to(0.75 * n, 32)", "n // 3", "n % 7", "max(1, n - 2) / 2", "-n ** 2", "ceil(n/3)"]
)
def test_sympy_agrees(source: str) -> None:
    symbolic = Expr.parse(source).to_sympy()
    (symbol,) = symbolic.free_symbols
    for n in (1, 5, 48, 100):
        exact = Fraction(Expr.parse(source).evaluate({"n": n}))
        assert symbolic.subs(symbol, n) == exact


def test_expressions_are_values() -> None:
    assert Expr.parse("heads/4") == Expr.parse("heads / 4")
    assert len({Expr.parse("heads/4"), Expr.parse("heads / 4")}) == 1
    assert Expr.parse("a + b * a").names == {"a", "b"}
    adapter = TypeAdapter(Expr)
    assert adapter.validate_python("heads / 4", strict=True) == Expr.parse("heads/4")
    assert adapter.dump_json(adapter.validate_json("4", strict=True)) == b'"4"'


def test_specs_import_neither_torch_nor_sympy() -> None:
    code = (
        "import sys, graphopt.spec; print([m for m in ('torch', 'sympy', 'transformers', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
