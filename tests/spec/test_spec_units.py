from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from graphopt.spec import (
    AtMost,
    AtMostBytes,
    AtMostCount,
    AtMostNumber,
    AtMostPercent,
    ByteSize,
    Count,
    Duration,
    Layers,
    Percent,
    ScalarError,
    Share,
    select_paths,
)


def test_percentages_are_exact() -> None:
    assert float(Percent.parse("75%")) == 0.75
    assert Percent.parse("29%").of(100) == 29
    assert Percent.parse("12.5 %").fraction == Fraction(1, 8)
    assert str(Percent.parse("12.5%")) == "12.5%"


@pytest.mark.parametrize(
    ("text", "wanted"), [("4GiB", 4 << 30), ("512MB", 512 * 10**6), ("10 kB", 10_000), ("1.5KiB", 1536), ("7B", 7)]
)
def test_bytes(text: str, wanted: int) -> None:
    assert ByteSize.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("6ms", 0.006), ("1.5s", 1.5), ("20us", 2e-5), ("20µs", 2e-5), ("2min", 120.0), ("1h", 3600.0)]
)
def test_durations(text: str, wanted: float) -> None:
    assert Duration.parse(text) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("1.5B", 1_500_000_000), ("350M", 350_000_000), ("2k", 2000), (7, 7), (1e9, 10**9), ("1T", 10**12)],
)
def test_counts(value: object, wanted: int) -> None:
    assert Count.parse(value) == wanted


@given(st.integers(0, 10**15))
def test_sizes_and_counts_print_as_they_read(number: int) -> None:
    assert ByteSize.parse(str(ByteSize(number))) == number
    assert Count.parse(str(Count(number))) == number


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Percent, 0.75, "0.75 has no unit|did you mean 75%?"),
        (Percent, 75, "75 has no unit|did you mean 75%?"),
        (Percent, "75", "75 has no unit|"),
        (Percent, "-5%", "a percentage cannot be negative: -5%|"),
        (Percent, True, "true is not a percentage|write it like 75%"),
        (Percent, "a lot", "'a lot' is not a percentage|write it like 75%"),
        (Share, "150%", "150% is more than 100%|"),
        (ByteSize, 4096, "4096 has no unit|did you mean 4096B?"),
        (ByteSize, "4gib", "unknown unit 'gib' of a size in bytes|did you mean 4GiB?"),
        (ByteSize, "0.3B", "0.3B is not a whole number of bytes|"),
        (Duration, 6, "6 has no unit|did you mean 6ms or 6s?"),
        (Duration, "6m", "unknown unit 'm' of a time|did you mean 6ms?"),
        (Count, "1.5", "1.5 is not a whole number|"),
        (Count, "3 apples", "unknown unit 'apples' of a count|"),
        (Layers, "5..2", "5..2 selects no layer|did you mean 2..5?"),
        (Layers, "first", "'first' does not select layers|write all, 3, 1..-2 or [0, 3, 5..7]"),
        (Layers, [], "an empty list selects no layer|write all, 3, 1..-2 or [0, 3, 5..7]"),
        (Layers, True, "true does not select layers|write all, 3, 1..-2 or [0, 3, 5..7]"),
        (AtMostPercent, "5%", "'5%' is not a limit|write it like 'at most 5%'"),
        (AtMostNumber, "at most many", "'many' is not a number|write 'at most 20'"),
        (AtMostBytes, "at most 4GIB", "unknown unit 'GIB' of a size in bytes|did you mean 4GiB?"),
        (AtMostCount, "at most 5 kilo", "unknown unit 'kilo' of a count|"),
    ],
)
def test_refusals_say_the_value_and_the_remedy(kind: type, value: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(value, strict=True)
    (error,) = caught.value.errors()
    cause = error["ctx"]["error"]
    assert isinstance(cause, ScalarError)
    (diagnostic,) = cause.diagnostics
    assert f"{diagnostic.message}|{' '.join(diagnostic.help)}" == message


@given(st.text(max_size=20), st.sampled_from([Percent, ByteSize, Duration, Count, Layers]))
def test_any_text_is_a_value_or_a_scalar_error(text: str, kind: type[Percent]) -> None:
    try:
        kind.parse(text)
    except ScalarError as error:
        start = error.start
    else:
        start = 0
    assert 0 <= start <= len(text)


def test_limits() -> None:
    parse = TypeAdapter(AtMostCount).validate_python
    assert parse("at most 1.5B") == AtMost(Count(1_500_000_000))
    assert parse("at most 80%").relative
    assert parse("at most 80%").bound(10) == 8
    assert parse("at most 2k").bound(10) == 2000
    assert str(parse("at most 80%")) == "at most 80%"
    assert TypeAdapter(AtMostBytes).validate_python("at most 4GiB").limit == 4 << 30
    assert TypeAdapter(AtMostNumber).validate_python("at most 20.5").bound(1.0) == 20.5


@pytest.mark.parametrize(
    ("value", "total", "wanted"),
    [
        ("all", 3, (0, 1, 2)),
        ("1..-2", 6, (1, 2, 3, 4)),
        (2, 6, (2,)),
        ("-1", 6, (5,)),
        (-1, 6, (5,)),
        ([0, 3, "5..7"], 8, (0, 3, 5, 6, 7)),
        (["1..3", 2, -1], 5, (1, 2, 3, 4)),
        ("-3..-1", 5, (2, 3, 4)),
        ("0 .. 1", 5, (0, 1)),
    ],
)
def test_layers(value: object, total: int, wanted: tuple[int, ...]) -> None:
    assert Layers.parse(value).resolve(total) == wanted


@pytest.mark.parametrize(
    ("value", "total", "message"),
    [
        (6, 6, "there is no layer 6: the model has 6 layers"),
        ("0..999999999", 6, "there is no layer 999999999: the model has 6 layers"),
        (-7, 6, "there is no layer -7: the model has 6 layers"),
        ("1..-2", 2, "1..-2 selects no layer of 2: it runs from 1 to 0"),
        ("all", 0, "there is no layer 0: the model has 0 layers"),
    ],
)
def test_a_selector_that_matches_nothing_is_an_error(value: object, total: int, message: str) -> None:
    with pytest.raises(ScalarError) as caught:
        Layers.parse(value).resolve(total)
    assert caught.value.diagnostics[0].message == message


@given(st.integers(1, 50), st.data())
def test_ranges_are_inclusive_at_both_ends(total: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, total - 1))
    last = data.draw(st.integers(first, total - 1))
    wanted = tuple(range(first, last + 1))
    assert Layers.parse(f"{first}..{last}").resolve(total) == wanted
    assert Layers.parse(f"{first}..{last - total}").resolve(total) == wanted
    assert Layers.parse(f"{first - total}..{last - total}").resolve(total) == wanted


PATHS = ("model.embed", "model.layers.0.attn", "model.layers.0.mlp", "model.layers.10.mlp", "head")


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("head", ["head"]),
        ("model.layers.*.mlp", ["model.layers.0.mlp", "model.layers.10.mlp"]),
        ("**.mlp", ["model.layers.0.mlp", "model.layers.10.mlp"]),
        ("model.**", list(PATHS[:4])),
        ("**", list(PATHS)),
        ("model.layers.1*.mlp", ["model.layers.10.mlp"]),
        ("**.layers.**.a*n", ["model.layers.0.attn"]),
    ],
)
def test_globs_are_anchored(pattern: str, wanted: list[str]) -> None:
    assert list(select_paths([pattern], PATHS)) == wanted


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ScalarError, match=r"'model\.layers\.0\.attm' matches nothing") as caught:
        select_paths(["model.layers.0.attm"], PATHS)
    assert caught.value.diagnostics[0].help == ("did you mean 'model.layers.0.attn'?",)
    with pytest.raises(ScalarError, match="'mlp' matches nothing"):
        select_paths(["**", "mlp"], PATHS)


def test_no_glob_takes_exponential_time() -> None:
    with pytest.raises(ScalarError):
        select_paths(["*a" * 90], ["a" * 2000 + "b"])
