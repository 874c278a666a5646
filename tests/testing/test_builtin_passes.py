"""Every built-in pass under every law, on a fixed pool of varied models, and what each ordered pair does."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest

from graphopt.passkit import PassRegistry
from graphopt.passkit.registry import BUILT_IN
from graphopt.testing import laws_of
from graphopt.testing.laws import LAWS, composes_or_is_refused
from graphopt.testing.models import Shape, build
from graphopt.testing.strategies import covering
from graphopt.testing.trial import Refused, trial

POOL = covering(8)
EXAMPLES = 8
PLAIN = {
    "add_momentum": {},
    "bound_cache": {"sink": 1, "recent": 3},
    "cleanup": {},
    "drop_tokens": {"span": "text", "layers": 1, "keep": "50%"},
    "insert_cache": {},
    "insert_exit": {"layers": 1},
    "insert_heads": {"heads": 2},
    "learn_gates": {"sink": 1, "recent": 3},
    "merge_experts": {"keep": "experts / 2"},
    "merge_tokens": {"span": "text", "layers": 1, "keep": "60%"},
    "mix_heads": {"keep": "heads / 2"},
    "prune_experts": {"keep": "experts - 1"},
    "prune_heads": {"keep": "50%", "unit": "kv_group"},
    "prune_hidden": {"keep": "50%"},
    "prune_neurons": {"keep": "40%"},
    "prune_units": {"units": ("query", "neuron"), "keep": "60%", "allocate": {"kind": "global", "tolerance": "50%"}},
    "quantize": {},
    "quantize_cache": {"group": 8, "recent": 8},
    "recover": {},
    "refactor_moe": {"experts": 2},
    "regroup_kv": {"kv_heads": "kv_heads / 2"},
    "reroute": {"top_k": 1},
    "resize_patches": {"patch": 3},
    "self_contrast": {},
    "skip_layers": {"layers": 1},
    "speculate": {"drafter": {"kind": "recycle"}},
}
MODEL = Shape(
    layers=3, heads=8, kv_heads=4, head_dim=4, hidden=8, neurons=10, gated=True, positions="rotary", tied=True
)
VISION = Shape(layers=3, heads=4, kv_heads=4, head_dim=4, hidden=8, neurons=10, positions="learned", kind="vision")
ROUTED = replace(MODEL, experts=4, chosen=2)
# Passes about experts are tried on a model that has some.
NEEDS_EXPERTS = {"add_momentum", "merge_experts", "prune_experts", "reroute", "self_contrast"}
# The same models over patches of a picture, half of them with positions.
PICTURES = [replace(shape, kind="vision", positions=("learned", "none")[i % 2]) for i, shape in enumerate(POOL)]
_REGISTRY = PassRegistry()

for _name in BUILT_IN:
    _class = _REGISTRY.get(_name)
    _pool = PICTURES if _name == "resize_patches" else POOL
    globals()[f"Test{_class.__name__}"] = laws_of(_class, max_examples=EXAMPLES, shapes=_pool)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PLAIN, PLAIN)))
def test_every_ordered_pair_composes_or_is_refused_in_words(first: str, second: str) -> None:
    vision = first == "resize_patches"
    # refactor_moe makes the experts that the second pass needs.
    routed = {first, second} & NEEDS_EXPERTS and first != "refactor_moe"
    program = build(VISION if vision else ROUTED if routed else MODEL)
    one, two = (_REGISTRY.get(name).model_validate(dict(PLAIN[name])) for name in (first, second))
    assert trial(one, program).plan.edits or first == "cleanup"
    try:
        composes_or_is_refused(one, two, program)
    except Refused as refusal:
        assert len(str(refusal)) > 10  # noqa: PT017


def test_pairs_cover_every_built_in_pass() -> None:
    assert set(PLAIN) == set(BUILT_IN)


def test_pool_covers_every_structural_choice() -> None:
    plain = Shape()
    for item in fields(Shape):
        values = {getattr(shape, item.name) for shape in POOL}
        assert len(values) > 1, item.name
        if isinstance(getattr(plain, item.name), bool):
            assert values == {False, True}, item.name
    assert {shape.place for shape in POOL} == {"pre", "post", "sandwich", "parallel"}
    assert {shape.positions for shape in POOL} == {"none", "rotary", "interleaved", "partial", "learned"}
    assert {shape.kind for shape in POOL} == {"decoder", "encoder_decoder", "vision"}
    assert {shape.dtype for shape in POOL} == {"float32", "bfloat16", "float64"}


@pytest.mark.parametrize("law", ["exact_means_exact", "surgery_equals_emulation"])
def test_cleanup_leaves_tables_whose_type_does_not_follow_the_run(law: str) -> None:
    # Found by a pair: rotary frequencies of a head of 6 came from integers divided, and were folded in float64.
    LAWS[law](_REGISTRY.get("cleanup")(), build(Shape(head_dim=6, positions="rotary")))


def test_a_model_without_neurons_to_cut_is_declined() -> None:
    program = trial(_REGISTRY.get("prune_neurons").model_validate({"keep": 1}), build(POOL[0])).after
    again = trial(_REGISTRY.get("prune_neurons").model_validate({"keep": 1}), program).plan
    assert not again.edits
    assert [decline.candidate for decline in again.declines] == [f"layers.{i}.feed_forward:neuron" for i in range(2)]


def test_a_list_of_layers_reads_back() -> None:
    step = _REGISTRY.get("skip_layers").model_validate({"layers": [0, "1..-1"]})
    LAWS["yaml_round_trip"](step, build(POOL[0]))


def test_heads_that_read_tokens_to_come_leave_generation_alone() -> None:
    # Found by fuzzing: such heads cannot run in a step, so that decoding failed in the middle of the graph.
    heads = _REGISTRY.get("insert_heads").model_validate({"kind": "hydra", "heads": 2})
    LAWS["generation_is_kept"](heads, build(Shape()))
