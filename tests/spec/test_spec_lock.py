from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.diagnostics import ArtifactError, SpecError
from graphopt.spec import LoadedSpec, Registry, json_schema, parse_spec, read_lock, write_lock

Load = Callable[..., LoadedSpec]
Write = Callable[[str, str], Path]
TEXT = (
    "graphopt: 1\nname: '1e-3'\ncalibration: {data: t.txt, samples: 1, seq: 4}\n"
    "steps: [{use: prune_heads, keep: 50%}]\n"
)


def test_a_lock_reads_back(load: Load, write: Write) -> None:
    write("t.txt", "words")
    loaded = load(TEXT, "seed=3")
    written = write_lock("spec.lock.yaml", loaded, {"fingerprint": "012", "error": 1e-7})
    lock = read_lock("spec.lock.yaml")
    assert lock == written
    assert lock.spec == loaded.resolved()
    assert lock.spec["seed"] == 3
    assert lock.files["t.txt"] == hashlib.sha256(b"words").hexdigest()
    assert lock.files["a.yaml"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert lock.packages["pydantic"]
    assert lock.facts == {"fingerprint": "012", "error": 1e-7}
    assert lock.changed_files() == ()
    write("t.txt", "other")
    os.unlink("a.yaml")
    assert lock.changed_files() == ("a.yaml", "t.txt")


def test_the_resolved_spec_is_a_spec(load: Load, write: Write, registry: Registry) -> None:
    write("t.txt", "words")
    loaded = load(TEXT)
    again = parse_spec(json.dumps(loaded.resolved()), registry=registry)
    assert again.spec == loaded.spec
    assert [step.config for step in again.steps] == [step.config for step in loaded.steps]


plain_data: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["1e-3", "012", "0o14", "no", "null", "<<", "3:20", ".inf", "", "~", "- a", "a: b", "9" * 200]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(facts=st.dictionaries(st.text(max_size=8), plain_data, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_plain_facts_read_back(registry: Registry, facts: dict[str, Any]) -> None:
    write_lock("x.lock.yaml", parse_spec("graphopt: 1", registry=registry), facts)
    assert read_lock("x.lock.yaml").facts == facts


def test_a_failed_write_leaves_the_old_lock(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load("graphopt: 1")
    write_lock("x.lock.yaml", loaded, {"run": 1})
    before = sorted(os.listdir())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write 'x\.lock\.yaml': No space left on device"):
        write_lock("x.lock.yaml", loaded, {"run": 2})
    assert sorted(os.listdir()) == before
    assert read_lock("x.lock.yaml").facts == {"run": 1}


def test_what_is_not_a_lock_is_refused(load: Load, write: Write) -> None:
    with pytest.raises(ArtifactError, match="a lock holds plain data only"):
        write_lock("x.lock.yaml", load("graphopt: 1"), {"a": object()})
    with pytest.raises(SpecError, match="does not exist"):
        read_lock("x.lock.yaml")
    for text in ("lock: 2", "[]", "lock: 1\nspec: {}", ""):
        write("x.lock.yaml", text)
        with pytest.raises(SpecError, match="bad_lock"):
            read_lock("x.lock.yaml")


def test_the_schema_has_one_form_of_step_per_pass(registry: Registry) -> None:
    schema = json_schema(registry)
    json.dumps(schema)
    forms = {form["title"]: form for form in schema["properties"]["steps"]["items"]["oneOf"]}
    assert list(forms) == ["from", "prune_heads", "regroup_kv"]
    assert forms["prune_heads"]["description"] == "Removes attention heads."
    assert forms["prune_heads"]["required"] == ["use", "keep"]
    assert list(forms["prune_heads"]["properties"]) == [
        "use",
        "id",
        "optional",
        "where",
        "keep",
        "unit",
        "score",
        "allocate",
        "heads",
    ]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["graphopt"]


def test_every_reference_of_the_schema_is_defined(registry: Registry) -> None:
    schema = json_schema(registry)

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [each for below in value.values() for each in references(below)]
        return [each for item in value for each in references(item)] if isinstance(value, list) else []

    for reference in references(schema):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
