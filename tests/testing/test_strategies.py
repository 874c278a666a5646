"""What is drawn: legal shapes that shrink to a readable model, sizes that were not captured, configurations that parse."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from graphopt.passkit import PassRegistry
from graphopt.passkit.registry import BUILT_IN
from graphopt.testing.configurations import configurations
from graphopt.testing.models import Shape, build
from graphopt.testing.strategies import inputs, legal, pipelines, programs, shapes
from graphopt.views import Views

MODEL = Shape(layers=2, heads=4, kv_heads=2, head_dim=4, hidden=6, neurons=5)


def test_shapes_shrink_to_one_plain_layer() -> None:
    smallest = find(shapes(), lambda shape: True)
    assert smallest == Shape(hidden=2, vocabulary=3)
    gated = find(shapes(), lambda shape: shape.packed_gate_up and shape.heads > 2)
    assert gated == Shape(heads=3, hidden=2, vocabulary=3, gated=True, packed_gate_up=True)


@given(shapes())
@settings(max_examples=100)
def test_shapes_are_data(shape: Shape) -> None:
    assert Shape(**json.loads(json.dumps(shape.to_json()))) == shape
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize("wrong", [{"heads": 3, "kv_heads": 2}, {"head_dim": 3, "positions": "rotary"}, {"layers": 0}])
def test_impossible_shapes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"KV heads|head_dim|at least 1"):
        Shape(**wrong)  # type: ignore[arg-type]


def test_views_see_what_the_shape_says() -> None:
    shape = legal({**Shape().__dict__, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "hidden": 6})
    views = Views(build(shape))
    assert [(a.heads, a.kv_heads, a.head_dim, a.causal) for a in views.attentions] == [(4, 2, 4, True)] * 2
    assert [f.neurons for f in views.feed_forwards] == [2, 2]
    assert len(views.blocks) == 2


@given(st.data())
@settings(max_examples=30)
def test_inputs_are_never_the_captured_size(data: st.DataObject) -> None:
    program = data.draw(programs((MODEL,)))
    made = data.draw(inputs(program))["input_ids"]
    assert made.shape != (3, 19)
    assert made.dtype == torch.int64
    assert int(made.max()) < MODEL.vocabulary


def test_inputs_shrink_to_one_token() -> None:
    assert find(inputs(build(MODEL)), lambda made: True)["input_ids"].shape == (1, 1)


@pytest.mark.parametrize("name", BUILT_IN)
def test_configurations_reach_every_option(name: str) -> None:
    kind = PassRegistry().get(name)
    seen: set[str] = set()

    @settings(max_examples=150, derandomize=True, database=None)
    @given(configurations(kind, build(MODEL)))
    def collect(config: object) -> None:
        assert isinstance(config, kind)
        seen.update(config.model_fields_set)

    collect()
    assert seen == set(kind.model_fields)


@given(pipelines(pool=(MODEL,)))
@settings(max_examples=20)
def test_pipelines_are_specs(pipeline: object) -> None:
    from graphopt.testing.strategies import Pipeline

    assert isinstance(pipeline, Pipeline)
    assert 1 <= len(pipeline.steps) <= 3
    assert [step["use"] for step in json.loads(pipeline.spec)["steps"]] == [step.name for step in pipeline.steps]
