from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt.diagnostics import SpecError
from graphopt.spec import LoadedSpec, Registry, load_spec

Write = Callable[[str, str], Path]


@pytest.fixture
def compose(registry: Registry) -> Callable[[str], LoadedSpec]:
    return lambda name: load_spec(name, registry=registry)


@pytest.fixture
def refused(registry: Registry) -> Callable[[str], str]:
    def _refused(name: str) -> str:
        with pytest.raises(SpecError) as caught:
            load_spec(name, registry=registry)
        return str(caught.value)

    return _refused


def test_extends_merges_settings_and_never_steps(write: Write, compose: Callable[[str], LoadedSpec]) -> None:
    write("models/text.txt", "words")
    write(
        "models/base.yaml",
        "graphopt: 1\nname: base\nmodel: ./tiny\ncalibration: {data: text.txt, samples: 8, seq: 16}\nseed: 1\n"
        "steps: [{use: regroup_kv, kv_heads: 1}]\n",
    )
    write("models/later.yaml", "graphopt: 1\nseed: 2\nsave: {format: graphopt}\n")
    write(
        "recipes/child.yaml",
        "graphopt: 1\nextends: [../models/base.yaml, ../models/later.yaml]\ncalibration: {samples: 4}\n"
        "steps: [{use: prune_heads, keep: 50%}]\n",
    )
    loaded = compose("recipes/child.yaml")
    calibration = loaded.spec.calibration
    assert calibration is not None
    assert (calibration.data, calibration.samples, calibration.seq) == ("models/text.txt", 4, 16)
    assert (loaded.spec.seed, loaded.spec.save.format, loaded.spec.model) == (2, "graphopt", "models/tiny")
    assert loaded.spec.name is None
    assert [step.use for step in loaded.steps] == ["prune_heads"]
    assert loaded.place_of("calibration", "seq").file == "models/base.yaml"
    assert [file.path for file in loaded.files] == ["recipes/child.yaml", "models/base.yaml", "models/later.yaml"]
    assert "extends" not in loaded.resolved()


def test_from_puts_steps_exactly_there(write: Write, compose: Callable[[str], LoadedSpec]) -> None:
    write("serve/inner.yaml", "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 2}]\n")
    write(
        "serve/outer.yaml",
        "graphopt: 1\nseed: 9\nsteps:\n  - from: inner.yaml\n  - {use: regroup_kv, kv_heads: 1}\n",
    )
    write(
        "a.yaml",
        "graphopt: 1\nsteps:\n  - {use: prune_heads, keep: 50%}\n  - from: serve/outer.yaml\n"
        "  - {use: prune_heads, keep: 25%}\n",
    )
    loaded = compose("a.yaml")
    configs: list[Any] = [step.config for step in loaded.steps]
    assert [step.use for step in loaded.steps] == ["prune_heads", "regroup_kv", "regroup_kv", "prune_heads"]
    assert [str(config.kv_heads) for config in configs[1:3]] == ["2", "1"]
    assert [step.origin for step in loaded.steps] == ["a.yaml", "serve/inner.yaml", "serve/outer.yaml", "a.yaml"]
    assert [step.index for step in loaded.steps] == [0, 1, 2, 3]
    assert loaded.spec.seed is None


def test_errors_in_every_file_are_reported_once(write: Write, refused: Callable[[str], str]) -> None:
    write("base.yaml", "graphopt: 1\nsed: 1\n")
    write("steps.yaml", "graphopt: 1\nextends: [base.yaml]\nsteps: [{use: regroup_kv, kv_haeds: 4, kv_heads: 4}]\n")
    write("a.yaml", "graphopt: 1\nextends: [base.yaml]\nsteps: [{from: steps.yaml}, {from: steps.yaml}]\nsede: 1\n")
    assert refused("a.yaml") == (
        "base.yaml:2:1: error: unknown field 'sed' in the spec  [unknown_field]\n"
        "    2 | sed: 1\n"
        "      | ^^^\n"
        "      = fields: graphopt, name, description, extends, model, calibration, evaluation, verify, steps, checks, "
        "save, seed\n"
        "      = help: did you mean 'seed'?\n"
        "\n"
        "a.yaml:4:1: error: unknown field 'sede' in the spec  [unknown_field]\n"
        "    4 | sede: 1\n"
        "      | ^^^^\n"
        "      = fields: graphopt, name, description, extends, model, calibration, evaluation, verify, steps, checks, "
        "save, seed\n"
        "      = help: did you mean 'seed'?\n"
        "\n"
        "steps.yaml:3:27: error: unknown field 'kv_haeds' in pass 'regroup_kv'  [unknown_field]\n"
        "    3 | steps: [{use: regroup_kv, kv_haeds: 4, kv_heads: 4}]\n"
        "      |                           ^^^^^^^^\n"
        "      = fields: use, id, optional, where, kv_heads, init, rank\n"
        "      = help: did you mean 'kv_heads'?"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extends: [/etc/base.yaml]", "a.yaml:2:11: error: '/etc/base.yaml' is absolute  [unsafe_path]"),
        ("extends: [bse.yaml]", "a.yaml:2:11: error: 'bse.yaml' does not exist  [missing_file]"),
        ("extends: [a.yaml]", "a.yaml:2:11: error: a spec cannot build on itself  [spec_cycle]"),
        ("steps: [{from: a.yaml}]", "a.yaml:2:16: error: a spec cannot build on itself  [spec_cycle]"),
        ("steps: [{from: /base.yaml}]", "a.yaml:2:16: error: '/base.yaml' is absolute  [unsafe_path]"),
        ('steps: [{from: "b\\0"}]', "a.yaml:2:16: error: a path with a null byte  [unsafe_path]"),
        ("steps: [{from: 3}]", "a.yaml:2:16: error: 'from' must be the path of a spec  [bad_type]"),
        ("steps: [{from: base.yaml}]", "a.yaml:2:16: error: 'base.yaml' has no steps to take over  [no_steps]"),
        (
            "steps: [{from: some.yaml, keep: 1%}]",
            "a.yaml:2:27: error: a step with 'from' takes no other field: 'keep'  [unknown_field]",
        ),
    ],
)
def test_what_cannot_be_composed(write: Write, refused: Callable[[str], str], line: str, message: str) -> None:
    write("base.yaml", "graphopt: 1\n")
    write("some.yaml", "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 1}]\n")
    write("a.yaml", f"graphopt: 1\n{line}\n")
    found = refused("a.yaml")
    assert found.splitlines()[0] == message
    assert found.count(" error: ") == 1


def test_a_cycle_names_its_files(write: Write, refused: Callable[[str], str]) -> None:
    write("a.yaml", "graphopt: 1\nextends: [b.yaml]\n")
    write("b.yaml", "graphopt: 1\nsteps: [{from: a.yaml}]\n")
    assert "= a.yaml -> b.yaml -> a.yaml" in refused("a.yaml")


def test_depth_uses_and_steps_are_bounded(write: Write, refused: Callable[[str], str]) -> None:
    for i in range(12):
        write(f"deep{i}.yaml", f"graphopt: 1\nextends: [deep{i + 1}.yaml]\n")
    assert "[spec_depth]" in refused("deep0.yaml")
    write("wide0.yaml", "graphopt: 1\nsteps: [{use: regroup_kv, kv_heads: 1}]\n")
    for i in range(1, 8):
        write(f"wide{i}.yaml", "graphopt: 1\nsteps:\n" + f"  - from: wide{i - 1}.yaml\n" * 9)
    assert "[spec_steps]" in refused("wide7.yaml")
    write("one.yaml", "graphopt: 1\n")
    write("many.yaml", f"graphopt: 1\nextends: [{', '.join(['one.yaml'] * 5000)}]\n")
    assert "[spec_files]" in refused("many.yaml")


def test_a_part_may_leave_out_what_the_whole_has(write: Write, compose: Callable[[str], LoadedSpec]) -> None:
    write("t.txt", "words")
    write("part.yaml", "graphopt: 1\ncalibration: {seq: 16}\n")
    write("a.yaml", "graphopt: 1\nextends: [part.yaml]\ncalibration: {data: t.txt, samples: 1}\n")
    assert compose("a.yaml").spec.calibration is not None
