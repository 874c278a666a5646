from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.diagnostics import SpecError, render
from graphopt.spec.scalars import resolve_plain
from graphopt.spec.yaml import LARGEST_FILE, Document, decode, find, parse_yaml, plain


def value(text: str) -> object:
    document = parse_yaml(text, "a.yaml")
    assert document.problems == ()
    assert document.root is not None
    return plain(document.root)


def messages(text: str) -> str:
    return "\n".join(render(problem) for problem in parse_yaml(text, "a.yaml").problems)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000.0),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("3:20", "3:20"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".5", 0.5),
        ("1.", 1.0),
        ("-7", -7),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("null", None),
        ("~", None),
        ("true", True),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("'1'", "1"),
        ('"null"', "null"),
        ("1..-2", "1..-2"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, wanted: object) -> None:
    found = value(f"a: {text}\n")
    assert found == {"a": wanted}
    assert type(found["a"]) is type(wanted)


def test_nothing_is_null_and_nan_is_a_number() -> None:
    assert value("a:\n") == {"a": None}
    assert math.isnan(value("[.nan]")[0])  # type: ignore[index]


@given(st.integers())
def test_integers_read_back(number: int) -> None:
    if len(str(number)) <= 100:
        assert resolve_plain(str(number)) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back(number: float) -> None:
    assert resolve_plain(repr(number)) == number


@given(st.text(max_size=60))
def test_any_text_is_a_tree_or_problems_with_places(text: str) -> None:
    document = parse_yaml(text, "a.yaml")
    for problem in document.problems:
        assert problem.place is not None
        render(problem)


def test_every_value_knows_its_place() -> None:
    document = parse_yaml("a:\n  - b: 12\n    c: 'x y'\n", "a.yaml")
    assert document.root is not None
    node, depth = find(document.root, ("a", 0, "c"))
    assert depth == 3
    assert (node.place.line, node.place.col, node.place.length) == (3, 8, 5)
    assert find(document.root, ("a", 7))[1] == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "a: 1\nb: 2\na: 3\n",
            "a.yaml:3:1: error: repeated key 'a'  [repeated_key]\n"
            "    3 | a: 3\n"
            "      | ^\n"
            "      = first given in line 1, column 1",
        ),
        (
            "a: &x 1\n",
            "a.yaml:1:4: error: anchors are not allowed: '&x'  [yaml_anchor]\n"
            "    1 | a: &x 1\n"
            "      |    ^^^^\n"
            "      = help: write the value where it is used, or use 'extends'",
        ),
        (
            "a: *x\n",
            "a.yaml:1:4: error: aliases are not allowed: '*x'  [yaml_alias]\n"
            "    1 | a: *x\n"
            "      |    ^^\n"
            "      = help: write the value out; quote a glob",
        ),
        (
            "<<: {a: 1}\n",
            "a.yaml:1:1: error: merge keys are not allowed: '<<'  [yaml_merge]\n"
            "    1 | <<: {a: 1}\n"
            "      | ^^\n"
            "      = help: use 'extends'",
        ),
        (
            "a: !!python/name:os.system 1\n",
            "a.yaml:1:4: error: tags are not allowed: 'tag:yaml.org,2002:python/name:os.system'  [yaml_tag]\n"
            "    1 | a: !!python/name:os.system 1\n"
            "      |    ^^^^^^^^^^^^^^^^^^^^^^^^^\n"
            "      = help: write the value alone",
        ),
        (
            "12: x\n",
            "a.yaml:1:1: error: a key is text, not 12  [yaml_key]\n    1 | 12: x\n      | ^^\n      = help: quote it",
        ),
        (
            "a:\n\t- b\n",
            "a.yaml:2:1: error: a tab cannot indent YAML  [yaml_tab]\n"
            "    2 |  - b\n"
            "      | ^\n"
            "      = help: use spaces",
        ),
        (
            "a: 1\n---\nb: 2\n",
            "a.yaml:2:1: error: a spec is one YAML document, this is a second one  [yaml_documents]\n"
            "    2 | ---\n"
            "      | ^^^",
        ),
        (
            "a: **.mlp\n",
            "a.yaml:1:5: error: a value that begins with '*' is an alias  [yaml_alias]\n"
            "    1 | a: **.mlp\n"
            "      |     ^\n"
            "      = help: quote a glob: '**.mlp'",
        ),
        (
            "a: b: c\n",
            "a.yaml:1:5: error: mapping values are not allowed here  [yaml_syntax]\n    1 | a: b: c\n      |     ^",
        ),
        (
            "a: 1e999\n",
            "a.yaml:1:4: error: 1e999 is too large for a number  [yaml_number]\n"
            "    1 | a: 1e999\n"
            "      |    ^^^^^\n"
            "      = help: write .inf for infinity",
        ),
    ],
)
def test_refusals_say_what_and_where(text: str, wanted: str) -> None:
    assert messages(text) == wanted


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("%YAML 1.1\n--- {a: 1}\n", "yaml_directive"),
        ("a: \x01", "yaml_character"),
        ("a: [1,\n", "yaml_syntax"),
        ("? [a]\n: 1\n", "yaml_key"),
        ('a: "\\ud800"', "yaml_encoding"),
        ("a: " + "9" * 200, "yaml_number"),
        ("~: 1", "yaml_key"),
        ("a: ! x", "yaml_tag"),
    ],
)
def test_refused(text: str, code: str) -> None:
    assert [problem.code for problem in parse_yaml(text, "a.yaml").problems] == [code]


def test_a_quoted_merge_sign_and_a_directive_of_1_2_are_fine() -> None:
    assert value("'<<': 1\n") == {"<<": 1}
    assert value("%YAML 1.2\n--- {a: 1}\n") == {"a": 1}


def test_all_problems_of_a_text_are_found() -> None:
    codes = [problem.code for problem in parse_yaml("a: &x 1\nb: *x\n<<: *x\na: 2\n", "a.yaml").problems]
    assert codes == ["yaml_anchor", "yaml_alias", "yaml_alias", "yaml_merge", "repeated_key"]


def test_bytes_are_utf_8_with_or_without_a_mark() -> None:
    assert decode(b"\xef\xbb\xbfa: 1", "f") == "a: 1"
    with pytest.raises(SpecError) as caught:
        decode(b"a: 1\nb: \xff", "f")
    assert (
        str(caught.value)
        == "f:2:4: error: byte 0xff is not UTF-8  [yaml_encoding]\n      = help: save the file as UTF-8"
    )


def alias_bomb() -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines)


def merge_bomb() -> str:
    lines = ["a0: &a0 {x: 1}"]
    for i in range(1, 16):
        lines.append(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 4)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (alias_bomb(), "yaml_anchor"),
        (merge_bomb(), "yaml_anchor"),
        ("[" * 2000, "yaml_depth"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "yaml_depth"),
    ],
)
def test_bombs_are_answered_at_once(text: str, code: str) -> None:
    start = time.process_time()
    document: Document = parse_yaml(text, "a.yaml")
    taken = time.process_time() - start
    assert document.problems[0].code == code
    # A bomb that goes off takes minutes: this is the promise, not a measurement.
    assert taken < 0.2


def test_size_and_number_of_values_are_bounded() -> None:
    with pytest.raises(SpecError) as caught:
        decode(b"a" * (LARGEST_FILE + 1), "f")
    assert caught.value.code == "yaml_size"
    assert parse_yaml("[" + "1," * 30_000 + "]", "f").problems[0].code == "yaml_nodes"
    assert parse_yaml("{a: " * 32 + "1" + "}" * 32, "f").problems == ()
    assert parse_yaml("{a: " * 33 + "1" + "}" * 33, "f").problems[0].code == "yaml_depth"
