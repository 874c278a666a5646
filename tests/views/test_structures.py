"""Structures are recognised from the graph, and every legal surgery on them equals its emulation."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from graphopt.frontend.export import capture_module
from graphopt.ir.program import Input, Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import Plan, apply_edits, emulate_edits
from graphopt.report.explain import explain
from graphopt.views import Views, unit_groups
from tests.views import structures as s

SURGERIES: dict[str, dict[str, Any]] = {
    "head": {"use": "prune_heads", "keep": "max(heads - kv_heads, floor(kv_heads / heads) * (heads - 1))"},
    "neuron": {"use": "prune_neurons", "keep": "floor(0.75 * neurons)"},
    "hidden": {"use": "prune_hidden", "keep": "hidden - 2"},
    "layer": {"use": "skip_layers", "layers": 1},
    "expert": {"use": "prune_experts", "keep": "experts - 1"},
    "regroup": {"use": "regroup_kv", "kv_heads": "ceil(kv_heads / 2)"},
}


def _layers(*mixes: Any, feed: Any = s.Feed, scale: float = 1.0) -> s.Model:
    return s.Model(*(s.Layer(mix, feed(), scale) for mix in mixes))


MODELS: dict[str, Any] = {
    "plain": lambda: _layers(*(s.Attend() for _ in range(3))),
    "repeated": lambda: _layers(*(s.Attend(kv=2) for _ in range(3))),
    "gated_output": lambda: _layers(*(s.Attend(kv=2, gate=True) for _ in range(3))),
    "scaled_stream": lambda: _layers(*(s.Attend() for _ in range(3)), scale=0.7),
    "normed_neurons": lambda: _layers(*(s.Attend() for _ in range(3)), feed=lambda: s.Feed(gate=True, norm=True)),
    "one_neuron": lambda: s.Model(*(s.Layer(s.Attend(), s.Feed(n)) for n in (24, 1, 24))),
    "bank": lambda: _layers(*(s.Attend() for _ in range(3)), feed=s.Bank),
    "bank_neighbours": lambda: _layers(*(s.Attend() for _ in range(3)), feed=lambda: s.Bank(neighbours=True)),
    "hybrid": lambda: _layers(s.Convolve(), s.Attend(), s.Convolve(), s.Attend()),
    "selective": lambda: _layers(s.Select(), s.Attend(), s.Select(), s.Attend()),
    "shared": lambda: s.Model(*[s.Layer(s.Attend(), s.Feed())] * 3),
    "neighbours": lambda: _layers(*(s.Turned("neighbours") for _ in range(3))),
    "two products": lambda: _layers(*(s.Turned("two products") for _ in range(3))),
    "complex": lambda: _layers(*(s.Turned("complex") for _ in range(3))),
    "halves": lambda: _layers(*(s.Turned("halves") for _ in range(3))),
    "translator": s.Translator,
    "rereader": lambda: s.Rereader(*(s.Layer(s.Attend(), s.Feed()) for _ in range(3))),
    "keeper": lambda: s.Keeper(*(s.Layer(s.Attend(causal=False), s.Feed()) for _ in range(3))),
    "filter": lambda: _layers(*(s.Attend() for _ in range(3)), feed=s.Filter),
    "flattened": lambda: s.Model(*(s.Flattened(s.Attend(), s.Feed()) for _ in range(3))),
    "bypassed": lambda: s.Bypassed(*(s.Layer(s.Attend(), s.Feed()) for _ in range(3))),
    "streams": lambda: s.Streams(*(s.Layer(s.Attend(), s.Feed()) for _ in range(3))),
}


@cache
def _program(name: str) -> Program:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    inputs = [Input("ids", ("B", "S"), torch.int64, "tokens")]
    if name == "translator":
        inputs.append(Input("said", ("B", "S"), torch.int64, "tokens"))
    return capture_module(module, tuple(inputs))


def _plan(views: Views, surgery: str) -> Plan:
    step = dict(SURGERIES[surgery])
    config = PassRegistry().get(step.pop("use")).model_validate_json(json.dumps(step))
    return config.plan(Context(views, tuple(range(len(views.blocks)))))


def _error(program: Program, views: Views, plan: Plan) -> float:
    after, expected = apply_edits(program, views, plan.edits), emulate_edits(program, views, plan.edits)
    generator = torch.Generator().manual_seed(1)
    ids = {spec.name: torch.randint(0, s.WORDS, (2, 7), generator=generator) for spec in program.entry.inputs}
    with torch.no_grad():
        got, wanted = (p.module(torch.float64)(**ids)[0] for p in (after, expected))
    return float((got - wanted).abs().max() / wanted.abs().max())


# Blocks, attentions, feed-forwards, expert banks, mixers, and the surgeries that are declined.
WANTED: dict[str, tuple[int, int, int, int, int, set[str]]] = {
    "plain": (3, 3, 3, 0, 0, {"expert"}),
    "repeated": (3, 3, 3, 0, 0, {"expert"}),
    "gated_output": (3, 3, 3, 0, 0, {"expert"}),
    "scaled_stream": (3, 3, 3, 0, 0, {"expert"}),
    "normed_neurons": (3, 3, 3, 0, 0, {"neuron", "expert"}),
    "one_neuron": (3, 3, 2, 0, 0, {"expert"}),
    "bank": (3, 3, 3, 3, 0, set()),
    "bank_neighbours": (3, 3, 3, 3, 0, set()),
    "hybrid": (4, 2, 4, 0, 2, {"expert"}),
    "selective": (4, 2, 4, 0, 2, {"expert"}),
    "shared": (3, 3, 3, 0, 0, {"regroup", "expert"}),
    "neighbours": (3, 3, 3, 0, 0, {"expert"}),
    "two products": (3, 3, 3, 0, 0, {"expert"}),
    "complex": (3, 3, 3, 0, 0, {"expert"}),
    "halves": (3, 3, 3, 0, 0, {"expert"}),
    "translator": (5, 8, 5, 0, 0, {"expert"}),
    "rereader": (3, 3, 3, 0, 0, {"expert"}),
    "keeper": (3, 3, 3, 0, 0, {"expert"}),
    "filter": (3, 3, 3, 0, 0, {"expert"}),
    "bypassed": (3, 3, 3, 0, 0, {"expert"}),
    "flattened": (3, 3, 3, 0, 0, {"expert"}),
    "streams": (3, 3, 3, 0, 0, {"expert"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_found_and_surgeries_equal_their_emulation(name: str) -> None:
    program = _program(name)
    views = Views(program)
    found = (views.blocks, views.attentions, views.feed_forwards, views.experts, views.mixers)
    assert tuple(map(len, found)) == WANTED[name][:5]
    assert not [one for one in views.unseen if name != "one_neuron"]
    declined = set()
    for surgery in SURGERIES:
        plan = _plan(views, surgery)
        if not plan.edits:
            assert all(decline.reason for decline in plan.declines)
            declined.add(surgery)
            continue
        assert _error(program, views, plan) < 1e-10, surgery
    assert declined == WANTED[name][5]
    assert explain(program).plain()


def test_rotary_embedding_is_raised_in_every_spelling() -> None:
    for name in ("neighbours", "two products", "complex", "halves"):
        targets = [str(node.target) for node in _program(name).graph.graph.nodes]
        assert sum("graphopt.rotary" in target for target in targets) == 6, name
        assert {a.positions for a in Views(_program(name)).attentions} == {"rotary"}


def test_repeated_heads_are_shared_by_the_attention_itself() -> None:
    assert {a.kv_heads for a in Views(_program("repeated")).attentions} == {2}
    assert not any("expand" in str(node.target) for node in _program("repeated").graph.graph.nodes)


def test_banks_name_their_router_their_choice_and_what_all_tokens_share() -> None:
    for name, activation in (("bank", "silu"), ("bank_neighbours", "sigmoid")):
        views = Views(_program(name))
        for experts in views.experts:
            assert (experts.experts, experts.top_k, experts.neurons) == (s.EXPERTS, s.CHOSEN, s.NEURONS)
            assert experts.activation == activation
            assert experts.gate is experts.up
            assert experts.router is not None
            assert experts.router.weight.endswith("r.weight")
            assert len(experts.shared) == 1
        groups = unit_groups(views, "expert")
        assert [group.units for group in groups] == [s.EXPERTS] * 3
        assert all((group.least, group.locked) == (s.CHOSEN, ()) for group in groups)


def test_mixers_are_shown_and_left_alone() -> None:
    text = explain(_program("hybrid")).plain()
    assert "mixes tokens by a convolution, left alone" in text


@pytest.mark.parametrize(("mix", "kind"), [(s.Step, "recurrence"), (s.Pointer, "softmax")])
def test_layers_without_attention_are_told_by_how_they_mix(mix: Any, kind: str) -> None:
    torch.manual_seed(0)
    program = capture_module(_layers(*(mix() for _ in range(3))), (Input("ids", ("B", "S"), torch.int64, "tokens"),))
    views = Views(program)
    assert [mixer.kind for mixer in views.mixers] == [kind] * 3
    assert len(views.blocks) == len(views.feed_forwards) == 3
    assert any("softmax" in one.reason for one in views.unseen) == (kind == "softmax")
    assert "left alone" in explain(program).plain()


def test_keys_of_an_earlier_layer_are_no_cross_attention() -> None:
    assert not any(attention.cross for attention in Views(_program("keeper")).attentions)


def test_one_neuron_is_declined_with_its_reason() -> None:
    views = Views(_program("one_neuron"))
    assert [one.reason for one in views.unseen] == ["it has a single neuron"]
    assert "it has a single neuron" in {decline.reason for decline in _plan(views, "neuron").declines}


def test_an_encoder_and_a_decoder_are_two_stacks() -> None:
    views = Views(_program("translator"))
    assert [block.stack for block in views.blocks] == [0, 0, 1, 1, 1]
    assert [[a.cross for a in block.attentions] for block in views.blocks] == [[False]] * 2 + [[False, True]] * 3


def test_shared_weights_are_one_group() -> None:
    views = Views(_program("shared"))
    assert len(unit_groups(views, "neuron")) == 1
    assert len(unit_groups(views, "query")) == 1


def test_a_layer_whose_keys_others_read_is_not_skipped() -> None:
    views = Views(_program("keeper"))
    config = PassRegistry().get("skip_layers").model_validate({"layers": 0})
    plan = config.plan(Context(views, (0, 1, 2)))
    assert not plan.edits
    assert any("other layers read" in decline.reason for decline in plan.declines)
