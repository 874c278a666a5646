"""What is drawn: legal shapes that shrink to a readable model, sizes that were not captured, configurations that parse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from graphopt.compiler.verify import random_inputs
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


@pytest.mark.parametrize(
    "wanted",
    [
        {"kind": "encoder_decoder"}, {"kind": "vision", "causal": False}, {"experts": 2}, {"experts": 3, "chosen": 2},
        {"positions": "interleaved"}, {"positions": "partial", "head_dim": 4}, {"window": 1}, {"dtype": "bfloat16"},
    ],
    ids=str,
)  # fmt: skip
def test_every_choice_is_drawn_and_shrinks_to_itself(wanted: dict[str, Any]) -> None:
    def drawn(shape: Shape) -> bool:
        return all(getattr(shape, name) == value for name, value in wanted.items())

    found = find(shapes(), drawn, settings=settings(max_examples=2000, derandomize=True, database=None))
    assert found == Shape(**{"hidden": 2, "vocabulary": 3, **wanted})


def run(shape: Shape, **changed: torch.Tensor) -> torch.Tensor:
    """The first result of a shape's model in float64 at sizes that were not captured."""
    program = build(shape)
    given = random_inputs(program, {"B": 2, "S": 6, "T": 4}, 0) | changed
    return program.module(torch.float64)(**given)[0]


def test_a_decoder_reads_its_encoder() -> None:
    shape = Shape(kind="encoder_decoder", layers=2, heads=2, kv_heads=2)
    logits = run(shape)
    assert logits.shape == (2, 6, 5)
    features = random_inputs(build(shape), {"B": 2, "S": 6, "T": 4}, 0)["features"]
    assert features.shape == (2, 4, 4)
    features[1, 3] += 1
    other = run(shape, features=features)
    assert torch.equal(other[0], logits[0])
    assert bool((other[1] != logits[1]).any(-1).all())
    assert sum(attention.cross for attention in Views(build(shape)).attentions) == 2


def test_vision_reads_a_picture() -> None:
    shape = Shape(kind="vision", layers=2, positions="learned")
    assert run(shape).shape == (2, 5)
    picture = random_inputs(build(shape), {"B": 2}, 0)["pixel_values"]
    assert picture.shape == (2, 3, 6, 6)
    picture[0, 2, 5, 5] += 1
    assert ((run(shape, pixel_values=picture) != run(shape)).any(-1)).tolist() == [True, False]


def test_tokens_go_to_the_chosen_experts() -> None:
    """With as many chosen as there are, shares sum to one; with fewer, some experts have no say in a token."""
    every, one = (build(Shape(experts=3, chosen=chosen)) for chosen in (3, 1))
    assert every.weights["layers.0.feed_forward.up"].expr.shape == (3, 4, 2)
    shares = [node for node in one.graph.graph.nodes if node.target is torch.ops.aten.topk.default]
    assert [node.args[1] for node in shares] == [1]
    assert not torch.allclose(run(Shape(experts=3, chosen=3)), run(Shape(experts=3, chosen=1)))


@pytest.mark.parametrize("positions", ["rotary", "interleaved", "partial"])
def test_rotary_depends_on_distance_alone(positions: str) -> None:
    from graphopt.testing.models import rotate, rotated

    shape = Shape(head_dim=8, positions=positions)  # type: ignore[arg-type]
    width = rotated(shape)
    assert width == (4 if positions == "partial" else 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = positions == "interleaved"

    def score(i: int, j: int) -> float:
        frequency = torch.arange(1, width // 2 + 1, dtype=torch.float64)
        angles = [
            at * (frequency.repeat_interleave(2) if near else frequency.repeat(2))[None, None, None] for at in (i, j)
        ]
        return float((rotate(q, angles[0], near) * rotate(k, angles[1], near)).sum())

    assert score(5, 3) == pytest.approx(score(9, 7))
    assert score(5, 3) != pytest.approx(score(5, 4))


@given(shapes())
@settings(max_examples=100)
def test_shapes_are_data(shape: Shape) -> None:
    assert Shape(**json.loads(json.dumps(shape.to_json()))) == shape
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 3, "kv_heads": 2}, {"head_dim": 3, "positions": "rotary"}, {"layers": 0}, {"experts": 2, "chosen": 3}],
)
def test_impossible_shapes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"KV heads|head_dim|at least 1|cannot be chosen"):
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

    @settings(max_examples=400, derandomize=True, database=None)
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
