"""Words of an answer that a predictor admits to caches: one meaning as a mask and as buffers that grow with them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from graphopt.compiler.verify_decode import verify_decode
from graphopt.diagnostics import PlanError
from graphopt.ir.leaving import with_prompt
from graphopt.ir.program import Program
from graphopt.ops import admitted_attention, attention
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import Train, apply_edits
from graphopt.runtime import Decoder, generate, with_cache
from graphopt.runtime.speculate import Fixed, Speculator
from graphopt.runtime.speculate.copying import Copy
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.train import train
from graphopt.train.forward import Forward
from graphopt.views import Views
from tests.pictures import question, reader_program
from tests.tiny import after

TEXT = Shape(layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8, neurons=6, positions="rotary")
ANSWER = {"use": "drop_tokens", "span": "answer", "keep": "50%", "score": "predictor", "recipe": None}
IMAGE = {"use": "drop_tokens", "span": "image", "layers": 2, "keep": "25%", "score": "predictor", "recipe": None}
STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    # An untrained predictor that admits some words and not all of them.
    "text": ({**ANSWER, "layers": 1, "score": {"kind": "predictor", "seed": 2}},),
    "text, all layers": ({**ANSWER, "layers": 0},),
    "pictures": ({**ANSWER, "layers": 2},),
    "both halves": (IMAGE, {**ANSWER, "layers": 2}),
    "in front of both": (IMAGE, {**ANSWER, "layers": 3}),
}


@cache
def admitting(name: str) -> Program:
    """A tiny model after some steps."""
    return after(build(TEXT) if name.startswith("text") else reader_program(), *STEPS[name])


@cache
def cached(name: str) -> Program:
    """The same with a cache."""
    made, why = with_cache(admitting(name))
    assert why is None
    return made


@pytest.mark.parametrize("name", STEPS)
def test_pieces_equal_the_whole_text_behind_its_prompt(name: str) -> None:
    found = verify_decode(admitting(name), cached(name), None, "insert_cache")
    assert found["largest_relative_error"] < found["tolerance"]


@pytest.mark.parametrize("law", LAWS)
def test_laws(law: str) -> None:
    given = {key: value for key, value in STEPS["text"][0].items() if key != "use"}
    LAWS[law](PassRegistry().get("drop_tokens").model_validate_json(json.dumps(given)), build(TEXT))


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("text", "surgery_equals_emulation"),
        ("text", "save_and_load_keep_bits"),
        ("text", "cost_is_counted"),
        ("both halves", "cost_is_counted"),
    ],
)
def test_laws_of_the_cache(name: str, law: str) -> None:
    LAWS[law](PassRegistry().get("insert_cache")(), admitting(name))


@pytest.mark.parametrize("name", STEPS)
def test_generation_is_the_same_with_padding(name: str) -> None:
    """Row 0 is longer than the others, which are padded."""
    pictures = {} if name.startswith("text") else {"pixel_values": question(3)["pixel_values"].double()}
    ids = question(3)["input_ids"] if pictures else torch.tensor([[3, 4, 2, 1], [0, 2, 2, 3], [1, 1, 4, 2]])
    ids = torch.cat([torch.tensor([[3, 1, 2], [0, 0, 0], [0, 0, 0]]), ids], 1)
    padding = torch.ones_like(ids)
    padding[1:, :3] = 0
    if not any(spec.role == "padding" for spec in admitting(name).entry.inputs):
        ids, padding = ids[:, 3:], padding[:, 3:]
    given: dict[str, Any] = {"padding": padding, "max_new_tokens": 12, **pictures}
    plain = generate(admitting(name).module(torch.float64), ids, **given)
    assert torch.equal(generate(Decoder(cached(name), torch.float64), ids, **given), plain)


def admitted(name: str, ids: torch.Tensor) -> torch.Tensor:
    """Which words of a text `[B, S]` the predictor admits."""
    program = admitting(name)
    core = next(node for node in program.graph.graph.nodes if node.target is admitted_attention)
    found = Forward(program, [core.args[9].name], torch.float64)
    values = {weight: program.weights.evaluate(weight, torch.float64) for weight in found.weights}
    return found(values, {"input_ids": ids})[core.args[9].name] > 0.5


def words(length: int) -> torch.Tensor:
    """A text `[2, S]`."""
    return torch.randint(0, 5, (2, length), generator=torch.Generator().manual_seed(0))


def test_caches_hold_the_prompt_and_what_is_admitted() -> None:
    """Rows hold different numbers, layers in front of the predictor everything, and buffers are as long as need be."""
    ids = words(40)
    kept = admitted("text", ids)
    prompt, pieces = 6, (1, 1, 22, 1, 9)
    decoder = Decoder(cached("text"), torch.float64)
    held = decoder.cache(2, 60)
    start = held.bytes()
    results, place = [], 0
    for piece in (prompt, *pieces):
        results.append(decoder.step(held, ids[:, place : place + piece])[0])
        held.commit(piece)
        place += piece
    with torch.no_grad():
        given = {"input_ids": ids, "prompt": torch.ones(2, prompt, dtype=torch.int64)}
        whole = with_prompt(admitting("text")).module(torch.float64)(**given)[0]
    assert torch.allclose(torch.cat(results, 1), whole, atol=1e-12)
    kept[:, :prompt] = True
    places = held.buffers["cache_1_held_places"][:, 0]
    for row in range(2):
        assert places[row][places[row] >= 0].tolist() == kept[row].nonzero()[:, 0].tolist()
    counts = kept.sum(1)
    assert counts[0] != counts[1]
    assert 6 < int(counts.max()) < 40
    assert held.buffers["cache_0_keys"].shape[2] == 60
    assert int(counts.max()) <= held.buffers["cache_2_held_keys"].shape[2] < 60
    assert held.bytes() > start
    held.truncate(20)
    assert int((places >= 0).sum()) == int(kept[:, :20].sum())
    held.truncate(0)
    assert int((places >= 0).sum()) == 0


def test_a_token_that_is_not_admitted_changes_no_later_one() -> None:
    """In the last layer's attention alone: what stands in a rejected place matters to itself only."""
    ids = words(40)
    row, place = (~admitted("text, all layers", ids)).nonzero()[0].tolist()
    other = ids.clone()
    other[row, place] = ids[row, place] % 4 + 1
    run = admitting("text, all layers").module(torch.float64)
    with torch.no_grad():
        changed = (run(input_ids=ids)[0] != run(input_ids=other)[0]).any(-1)
    still = admitted("text, all layers", other)[row, place]
    assert bool(still) or int(changed.sum()) == 1


def test_the_whole_text_as_prompt_is_the_program_before() -> None:
    """All of a prompt is admitted, so that its logits are those of the model, bit for bit."""
    ids = torch.randint(0, 5, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (ours, theirs) = (
            program.module()(input_ids=ids, **more)[0]
            for program, more in ((with_prompt(admitting("text")), {"prompt": torch.ones_like(ids)}), (build(TEXT), {}))
        )
        judging = admitting("text").module()(input_ids=ids)[0]
    assert torch.equal(ours, theirs)
    assert not torch.equal(judging, theirs)


def test_drafted_tokens_are_those_of_plain_decoding() -> None:
    prompt = torch.tensor([3, 4, 2, 1, 3, 4, 2, 1, 3, 4])
    plain = generate(admitting("text").module(torch.float64), prompt[None], max_new_tokens=12)
    found, log = Speculator(Decoder(cached("text"), torch.float64), Copy(2, 6), Fixed(4)).generate(prompt, 12)
    assert torch.equal(found, plain[0])
    assert log.acceptance_rate > 0


@pytest.mark.parametrize("sinks", [False, True])
def test_a_gradient_says_what_admission_would_change(sinks: bool) -> None:
    """The op with a gradient computes the same, and a token's gradient is the slope of its weight in the softmax."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 4, generator=random, dtype=torch.float64) for heads in (4, 2, 2))
    sink = torch.randn(4, generator=random, dtype=torch.float64) if sinks else None
    admit = (torch.rand(2, 7, generator=random) > 0.5).double()

    def call(weight: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = admitted_attention(q, k, v, None, sink, 0.5, True, None, None, weight)
        return found

    given = admit.clone().requires_grad_()
    result = call(given)
    own = torch.eye(7, dtype=torch.bool)
    mask = (admit.bool()[:, None, None] | own) & own.new_ones(7, 7).tril()
    assert torch.allclose(result, attention(q, k, v, mask, sink, 0.5, False, None, None))
    result.square().sum().backward()

    def weighed(weight: torch.Tensor) -> float:
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.5
        seen = torch.where(own, 1.0, weight[:, None, None]) * own.new_ones(7, 7).tril()
        mass = logits.exp() * seen
        rest = 0 if sink is None else sink.exp()[:, None, None]
        return float(((mass / (mass.sum(-1, keepdim=True) + rest)) @ v.repeat_interleave(2, 1)).square().sum())

    for place in (0, 3, 5):
        up, down = admit.clone(), admit.clone()
        up[0, place] += 1e-6
        down[0, place] -= 1e-6
        assert given.grad is not None
        assert float(given.grad[0, place]) == pytest.approx((weighed(up) - weighed(down)) / 2e-6, abs=1e-6)


def test_a_predictor_learns_to_admit_a_share() -> None:
    """Of random tokens the wanted share is admitted, where an untrained predictor admits another."""
    text = torch.randint(0, 5, (4000,), generator=torch.Generator().manual_seed(2))
    program, views = build(TEXT), Views(build(TEXT))
    recipe = {"steps": 60, "batch": 4, "seq": 32, "rate": 3e-2, "warmup": 5}
    options = {**ANSWER, "layers": 1, "keep": "25%", "recipe": recipe, "loss": {"next_token": 1}}
    options.pop("use")
    views = Views(program)
    step = PassRegistry().get("drop_tokens").model_validate_json(json.dumps(options))
    plan = step.plan(Context(views, tuple(range(3))))
    (training,) = (edit.training for edit in plan.edits if isinstance(edit, Train))
    assert training.losses.kept is not None
    assert str(training.losses.kept.share) == "25%"
    assert len(training.weights) == 3
    changed = apply_edits(program, views, tuple(edit for edit in plan.edits if not isinstance(edit, Train)))
    _, record = train(changed, training, text)
    assert record.first["kept"] > 0.01
    assert record.last["kept"] < record.first["kept"] / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "norm"}, "a predictor decides about each"),
        ({"keep": 3}, "one share is kept"),
        ({"keep": ["50%", "25%"]}, "one share is kept"),
        ({"positions": "renumber"}, "positions: keep"),
        ({"action": "merge"}, "action: drop"),
        ({"past": "drop"}, "past: keep"),
    ],
)
def test_what_an_answer_has_no_use_for(options: dict[str, Any], message: str) -> None:
    given = {"span": "answer", "layers": 1, "keep": "50%", "score": "predictor", **options}
    with pytest.raises(ValueError, match=message):
        PassRegistry().get("drop_tokens").model_validate_json(json.dumps(given))


def test_declines() -> None:
    """Each layer is answered for: those in front, those with windows, and all when everything is kept."""

    def plan(program: Program, **options: Any) -> Any:
        views = Views(program)
        given = {key: value for key, value in {**ANSWER, **options}.items() if key != "use"}
        step = PassRegistry().get("drop_tokens").model_validate_json(json.dumps(given))
        return step.plan(Context(views, tuple(range(len(views.blocks)))))

    assert [str(d.reason) for d in plan(build(TEXT), layers=2).declines] == ["its caches hold every word"] * 2
    assert not plan(build(TEXT), layers=0, keep="100%").edits
    assert {d.reason for d in plan(build(TEXT), layers=0, keep="100%").declines} == {"every word is admitted"}
    windowed = plan(build(Shape(layers=2, window=3)), layers=0)
    assert not windowed.edits
    assert "its window of 3 tokens" in str(windowed.declines[0].reason)
    assert not plan(admitting("text"), layers=1).edits
    with pytest.raises(PlanError, match="one predictor"):
        plan(build(TEXT), layers=[0, 1])
