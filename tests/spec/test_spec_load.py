from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt.diagnostics import Place, SpecError
from graphopt.spec import Expr, LoadedSpec, Percent, Registry, load_spec, parse_spec, safe_output

Load = Callable[..., LoadedSpec]
Fail = Callable[..., str]
Write = Callable[[str, str], Path]

GOOD = """\
graphopt: 1
name: demo
model: ../models/tiny
calibration: {data: texts/a.txt, samples: 64, seq: 256}
steps:
  - use: regroup_kv
    kv_heads: heads / 4
  - use: prune_heads
    id: cut
    optional: true
    keep: 75%
    allocate: {kind: global, tolerance: 2%}
    heads: [1, 2]
    where: {layers: 1..-2, paths: ["**.attn"]}
checks: {perplexity: {increase: at most 5%}, kv_bytes: at most 4GiB, parameters: at most 80%}
verify: shapes
save: {format: transformers, shard_size: 1GB}
"""


def test_a_good_spec(load: Load, write: Write) -> None:
    write("texts/a.txt", "words")
    loaded = load(GOOD)
    assert loaded.spec.model == "../models/tiny"
    assert loaded.spec.calibration is not None
    assert loaded.spec.calibration.data == "texts/a.txt"
    assert loaded.spec.verify.level == "shapes"
    assert loaded.spec.save.shard_size == 10**9
    assert str(loaded.spec.checks.parameters) == "at most 80%"
    first, second = loaded.steps
    config: Any = first.config
    assert config.kv_heads == Expr.parse("heads/4")
    assert (first.index, first.use, first.id, first.optional, first.where) == (
        0,
        "regroup_kv",
        "regroup_kv",
        False,
        None,
    )
    config = second.config
    assert config.keep == Percent.parse("75%")
    assert config.heads == (1, 2)
    assert config.allocate.tolerance == Percent.parse("2%")
    assert (second.id, second.optional, second.origin) == ("cut", True, "a.yaml")
    assert second.options == {"keep": "75%", "allocate": {"kind": "global", "tolerance": "2%"}, "heads": [1, 2]}
    assert second.where is not None
    assert second.where.layers.resolve(4) == (1, 2)
    assert second.place == Place("a.yaml", 8, 10, 11)
    assert second.spans["allocate", "tolerance"] == Place("a.yaml", 12, 41, 2)
    assert second.place_of("allocate", "nothing") == second.spans["allocate",]
    assert second.place_of("nothing") == second.place
    assert loaded.place_of("checks", "kv_bytes").line == 15


def test_shorthand_stands_for_a_mapping(load: Load) -> None:
    config: Any = load("graphopt: 1\nsteps: [{use: prune_heads, keep: 50%, allocate: global}]").steps[0].config
    assert config.allocate.kind == "global"


def test_all_errors_of_a_file_are_reported_together(fail: Fail) -> None:
    text = """\
graphopt: 1
steps:
  - use: prune_heads
    scoer: taylor
    keep: 0.75
    score: fluctuatoin
    allocate: {kind: globl}
  - use: regrop_kv
  - use: regroup_kv
    kv_heads: "heads + __import__('os')"
    kv_heads: 4
"""
    assert fail(text) == (
        "a.yaml:4:5: error: unknown field 'scoer' in pass 'prune_heads'  [unknown_field]\n"
        "    4 |     scoer: taylor\n"
        "      |     ^^^^^\n"
        "      = fields: use, id, optional, where, keep, unit, score, allocate, heads\n"
        "      = help: did you mean 'score'?\n"
        "\n"
        "a.yaml:5:11: error: 0.75 has no unit  [bad_unit]\n"
        "    5 |     keep: 0.75\n"
        "      |           ^^^^\n"
        "      = help: did you mean 75%?\n"
        "\n"
        "a.yaml:6:12: error: unknown value 'fluctuatoin' of 'score'  [unknown_value]\n"
        "    6 |     score: fluctuatoin\n"
        "      |            ^^^^^^^^^^^\n"
        "      = allowed: magnitude, fluctuation\n"
        "      = help: did you mean 'fluctuation'?\n"
        "\n"
        "a.yaml:7:22: error: unknown kind 'globl' of 'allocate'  [unknown_kind]\n"
        "    7 |     allocate: {kind: globl}\n"
        "      |                      ^^^^^\n"
        "      = kinds: uniform, global\n"
        "      = help: did you mean 'global'?\n"
        "\n"
        "a.yaml:8:10: error: unknown pass 'regrop_kv'  [unknown_pass]\n"
        "    8 |   - use: regrop_kv\n"
        "      |          ^^^^^^^^^\n"
        "      = passes: prune_heads, regroup_kv\n"
        "      = help: did you mean 'regroup_kv'?\n"
        "\n"
        "a.yaml:10:24: error: '__import__' is not a dimension or a function  [bad_expression]\n"
        "   10 |     kv_heads: \"heads + __import__('os')\"\n"
        "      |                        ^^^^^^^^^^\n"
        "      = allowed: numbers, dimensions, + - * / // % **, parentheses, floor, ceil, min, max, round_to\n"
        "\n"
        "a.yaml:11:5: error: repeated key 'kv_heads'  [repeated_key]\n"
        "   11 |     kv_heads: 4\n"
        "      |     ^^^^^^^^\n"
        "      = first given in line 10, column 5"
    )


STEP = "graphopt: 1\nsteps:\n  - use: prune_heads\n    keep: 50%\n"


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        ("", "a.yaml:1:1: error: the spec is empty  [not_a_spec]"),
        ("- a", "a.yaml:1:1: error: a spec is a mapping  [not_a_spec]"),
        ("name: x", "a.yaml:1:1: error: missing field 'graphopt' in the spec  [missing_field]"),
        ("graphopt: 2", "a.yaml:1:11: error: unknown value 2 of 'graphopt'  [unknown_value]"),
        ("graphopt: 1\nstep: []", "a.yaml:2:1: error: unknown field 'step' in the spec  [unknown_field]"),
        ("graphopt: 1\nsteps: 3", "a.yaml:2:8: error: 'steps' must be a list, not 3  [bad_type]"),
        ("graphopt: 1\nsteps: [x]", "a.yaml:2:9: error: 'steps.0' must be a mapping, not 'x'  [bad_type]"),
        ("graphopt: 1\nseed: no", "a.yaml:2:7: error: 'seed' must be an integer, not 'no'  [bad_type]"),
        ("graphopt: 1\nseed: 1e-3", "a.yaml:2:7: error: 'seed' must be an integer, not 0.001  [bad_type]"),
        ("graphopt: 1\nseed: -1", "a.yaml:2:7: error: 'seed' must be at least 0, not -1  [out_of_range]"),
        ("graphopt: 1\nverify: of", "a.yaml:2:9: error: unknown value 'of' of 'verify'  [unknown_value]"),
        (
            "graphopt: 1\nverify: {level: of}",
            "a.yaml:2:17: error: unknown value 'of' of 'verify.level'  [unknown_value]",
        ),
        ("graphopt: 1\nextends: b.yaml", "a.yaml:2:10: error: 'extends' must be a list, not 'b.yaml'  [bad_type]"),
        (
            "graphopt: 1\nchecks: {perplexity: {increase: 5%}}",
            "a.yaml:2:33: error: '5%' is not a limit  [bad_limit]",
        ),
        (
            "graphopt: 1\nchecks: {kv_bytes: at most 4gib}",
            "a.yaml:2:29: error: unknown unit 'gib' of a size in bytes  [bad_unit]",
        ),
        (
            "graphopt: 1\ncalibration: {data: b.txt, samples: 1, seq: 1}",
            "a.yaml:2:21: error: 'b.txt' does not exist  [missing_file]",
        ),
        (
            'graphopt: 1\ncalibration: {data: "b\\0", samples: 1, seq: 1}',
            "a.yaml:2:21: error: a path with a null byte  [unsafe_path]",
        ),
        ("graphopt: 1\nsteps: [{keep: 1%}]", "a.yaml:2:9: error: a step has no 'use'  [missing_field]"),
        (
            "graphopt: 1\nsteps: [{use: prune_heads}]",
            "a.yaml:2:15: error: missing field 'keep' in pass 'prune_heads'  [missing_field]",
        ),
        (STEP + "    optional: yes", "a.yaml:5:15: error: 'optional' must be true or false, not 'yes'  [bad_type]"),
        (
            STEP + "    where: {layer: 1}",
            "a.yaml:5:13: error: unknown field 'layer' in 'where' of the step  [unknown_field]",
        ),
        (STEP + "    where: {layers: 5..2}", "a.yaml:5:21: error: 5..2 selects no layer  [selector_empty]"),
        (STEP + "    where: {paths: []}", "a.yaml:5:20: error: an empty list selects nothing  [selector_empty]"),
        (STEP + "    where: {paths: [a..b]}", "a.yaml:5:21: error: 'a..b' is not a path  [selector_syntax]"),
        (STEP + "    heads: [1, x]", "a.yaml:5:16: error: 'heads.1' must be an integer, not 'x'  [bad_type]"),
        (
            STEP + "    allocate: {kind: global, tolerence: 1%}",
            "a.yaml:5:30: error: unknown field 'tolerence' in 'allocate' of pass 'prune_heads'  [unknown_field]",
        ),
        (
            STEP + "    allocate: {kind: global, global: 1}",
            "a.yaml:5:30: error: unknown field 'global' in 'allocate' of pass 'prune_heads'  [unknown_field]",
        ),
        (
            STEP + "    allocate: {tolerance: 1%}",
            "a.yaml:5:15: error: missing field 'kind' in 'allocate' of pass 'prune_heads'  [missing_field]",
        ),
        (STEP + "    allocate: 3", "a.yaml:5:15: error: 'allocate' must be a mapping, not 3  [bad_type]"),
        (STEP + "    allocate: unifrm", "a.yaml:5:15: error: unknown kind 'unifrm' of 'allocate'  [unknown_kind]"),
        (
            STEP + "    id: 3x",
            "a.yaml:5:9: error: 'id' must match ^[A-Za-z][A-Za-z0-9_-]{0,63}$, not '3x'  [bad_value]",
        ),
        (
            "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 9**9**9}]",
            "a.yaml:2:40: error: the exponent 9**9 is not a number from 0 to 16  [bad_expression]",
        ),
        (
            "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 4, rank: abc}]",
            "a.yaml:2:46: error: no allowed form fits this value  [bad_value]",
        ),
        (
            "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 4, id: a}, {use: regroup_kv, kv_heads: 2, id: a}]",
            "a.yaml:2:83: error: repeated id 'a'  [repeated_id]",
        ),
    ],
)
def test_one_error_and_its_place(fail: Fail, text: str, first_line: str) -> None:
    message = fail(text)
    assert message.splitlines()[0] == first_line
    assert message.count(" error: ") == 1


def test_a_refused_value_causes_no_second_error(fail: Fail) -> None:
    assert fail("graphopt: 1\nseed: *x\n").count("error:") == 1
    assert fail("graphopt: 1\nsteps:\n  - use: regroup_kv\n    kv_heads: !!int 4\n").count("error:") == 1


def test_nothing_to_read_is_an_error_with_the_closest_name(registry: Registry, write: Write) -> None:
    write("recipe.yaml", "graphopt: 1")
    with pytest.raises(SpecError) as caught:
        load_spec("recipes.yaml", registry=registry)
    assert str(caught.value) == (
        "error: 'recipes.yaml' does not exist  [missing_file]\n      = help: did you mean 'recipe.yaml'?"
    )
    with pytest.raises(SpecError, match="is not a file"):
        load_spec(".", registry=registry)


def test_overrides(load: Load) -> None:
    text = STEP + "  - use: regroup_kv\n    kv_heads: 4\n"
    loaded = load(text, "steps.0.keep=25%", "steps.regroup_kv.kv_heads=heads / 8", "seed=012", "steps.0.heads=[1, 2]")
    config: Any = loaded.steps[0].config
    assert config.keep == Percent.parse("25%")
    assert config.heads == (1, 2)
    config = loaded.steps[1].config
    assert config.kv_heads.evaluate({"heads": 32}) == 4
    assert loaded.spec.seed == 12
    assert load(text, "save.format=graphopt").spec.save.format == "graphopt"


def test_overrides_from_python_keep_their_types(registry: Registry) -> None:
    loaded = parse_spec(STEP, {"seed": 3, "name": "no", "steps.0.heads": (1,)}, registry=registry)
    assert (loaded.spec.seed, loaded.spec.name) == (3, "no")
    with pytest.raises(SpecError) as caught:
        parse_spec(STEP, {"seed": "3", "name": object()}, registry=registry)
    assert [each.code for each in caught.value.diagnostics] == ["bad_override", "bad_type"]


def test_errors_in_overrides_point_at_the_argument(fail: Fail) -> None:
    text = STEP + "  - use: regroup_kv\n    kv_heads: 4\n"
    arguments = ("steps.0.keep=5o%", "steps.regroup.init=svd", "steps.1.inti=svd", "steps=[]", "seed", "name=[")
    assert fail(text, *arguments) == (
        "--set: error: 'steps' has no item 'regroup'  [bad_override]\n"
        "      | --set steps.regroup.init=svd\n"
        "      |       ^^^^^^^^^^^^^^^^^^\n"
        "      = allowed: prune_heads, regroup_kv, 0..1\n"
        "      = help: did you mean 'regroup_kv'?\n"
        "\n"
        "--set: error: 'steps' cannot be set from outside  [bad_override]\n"
        "      | --set steps=[]\n"
        "      |       ^^^^^\n"
        "\n"
        "--set: error: an override is key=value  [bad_override]\n"
        "      | --set seed\n"
        "      | ^^^^^^^^^^\n"
        "      = help: write steps.0.keep=50%\n"
        "\n"
        "--set: error: expected the node content, but found '<stream end>'  [yaml_syntax]\n"
        "      | --set name=[\n"
        "      |             ^\n"
        "\n"
        "--set: error: unknown unit 'o%' of a percentage  [bad_unit]\n"
        "      | --set steps.0.keep=5o%\n"
        "      |                     ^^\n"
        "      = units: %\n"
        "      = help: did you mean 5%?\n"
        "\n"
        "--set: error: unknown field 'inti' in pass 'regroup_kv'  [unknown_field]\n"
        "      | --set steps.1.inti=svd\n"
        "      |       ^^^^^^^^^^^^\n"
        "      = fields: use, id, optional, where, kv_heads, init, rank\n"
        "      = help: did you mean 'init'?"
    )


def test_ids_are_numbered_where_a_pass_repeats(load: Load) -> None:
    text = STEP + "  - {use: prune_heads, keep: 1%}\n  - {use: prune_heads, keep: 1%, id: prune_heads_2}\n"
    assert [step.id for step in load(text).steps] == ["prune_heads", "prune_heads_3", "prune_heads_2"]


def test_data_need_not_exist_when_told_so(registry: Registry) -> None:
    text = "graphopt: 1\ncalibration: {data: b.txt, samples: 1, seq: 1}"
    assert parse_spec(text, registry=registry, check_files=False).spec.calibration is not None


@pytest.mark.parametrize("path", ["../out", "a/../../b", "a\\..\\b", "", "a\0b"])
def test_unsafe_outputs_are_refused(path: str) -> None:
    with pytest.raises(SpecError) as caught:
        safe_output(path)
    assert caught.value.code == "unsafe_path"


def test_safe_outputs_pass() -> None:
    assert safe_output("out/a..b") == Path("out/a..b")
