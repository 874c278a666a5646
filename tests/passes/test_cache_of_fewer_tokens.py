"""insert_cache where tokens leave: the prompt decides, later layers hold less, and generation stays the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from graphopt.compiler.verify_decode import verify_decode
from graphopt.cost import cost
from graphopt.diagnostics import PlanError
from graphopt.ir.leaving import with_prompt
from graphopt.ir.program import Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import apply_edits
from graphopt.runtime import Decoder, generate, with_cache
from graphopt.runtime.speculate import Fixed, Speculator
from graphopt.runtime.speculate.copying import Copy
from graphopt.runtime.speculate.network import Chain
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.views import Views
from tests.pictures import ENTRIES, question, reader_program
from tests.tiny import after

TEXT = Shape(layers=3, heads=4, kv_heads=2, head_dim=4, hidden=8, neurons=6, positions="rotary")
DROP = {"use": "drop_tokens"}
IMAGE = {**DROP, "span": "image"}
STEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "pyramid": (
        {
            **IMAGE,
            "layers": [1, 2, 3],
            "keep": ["50%", "25%", "12.5%"],
            "score": {"kind": "attention", "of": "last", "at": "next"},
            "positions": "renumber",
        },
    ),
    "from the encoder on": (
        {"use": "merge_tokens", "span": "patches", "layers": 1, "keep": "75%"},
        {**IMAGE, "layers": [1, 3], "keep": ["50%", "25%"], "score": {"kind": "attention", "of": "text"}},
    ),
    "predictor": ({**IMAGE, "layers": 2, "keep": "25%", "score": "predictor", "recipe": None},),
    "merged": ({**IMAGE, "layers": [0, 2], "keep": "50%", "score": "similarity", "action": "merge"},),
    "pyramid, no past": (
        {
            **IMAGE,
            "layers": [1, 2, 3],
            "keep": ["50%", "25%", "12.5%"],
            "score": {"kind": "attention", "of": "last", "at": "next"},
            "positions": "renumber",
            "past": "drop",
        },
    ),
    "from the encoder on, no past": (
        {"use": "merge_tokens", "span": "patches", "layers": 1, "keep": "75%"},
        {**IMAGE, "layers": 1, "keep": "50%", "score": {"kind": "attention", "of": "text"}, "past": "drop"},
        {**IMAGE, "layers": 3, "keep": "25%", "score": {"kind": "attention", "of": "text"}},
    ),
    "text, no past": (
        {**DROP, "span": "text", "layers": [1, 2], "keep": ["50%", "25%"], "score": {"kind": "random"}, "past": "drop"},
    ),
    "text": ({**DROP, "span": "text", "layers": [1, 2], "keep": ["50%", "25%"], "score": {"kind": "random"}},),
    "text, moved up": (
        {
            **DROP,
            "span": "text",
            "layers": 1,
            "keep": "50%",
            "score": {"kind": "attention", "of": "last"},
            "positions": "renumber",
        },
    ),
}


@cache
def fewer(name: str) -> Program:
    """A tiny model after some steps."""
    return after(build(TEXT) if name.startswith("text") else reader_program(), *STEPS[name])


@cache
def cached(name: str) -> Program:
    """The same with a cache."""
    made, why = with_cache(fewer(name))
    assert why is None
    return made


@pytest.mark.parametrize("name", STEPS)
def test_pieces_equal_the_whole_text_that_the_prompt_chose_from(name: str) -> None:
    found = verify_decode(fewer(name), cached(name), None, "insert_cache")
    assert found["largest_relative_error"] < found["tolerance"]


@pytest.mark.parametrize(
    ("name", "law"),
    [("text", "surgery_equals_emulation"), ("text", "save_and_load_keep_bits"), ("pyramid", "cost_is_counted")],
)
def test_laws(name: str, law: str) -> None:
    LAWS[law](PassRegistry().get("insert_cache")(), fewer(name))


@pytest.mark.parametrize("name", ["pyramid", "pyramid, no past", "from the encoder on, no past"])
def test_generation_is_the_same_with_padding_and_pictures(name: str) -> None:
    """Row 0 is longer than the others, which are padded."""
    asked = question(3)
    ids = torch.cat([torch.tensor([[5, 6, 7], [0, 0, 0], [0, 0, 0]]), asked["input_ids"]], 1)
    padding = torch.ones_like(ids)
    padding[1:, :3] = 0
    given: dict[str, Any] = {"padding": padding, "max_new_tokens": 6, "pixel_values": asked["pixel_values"].double()}
    plain = generate(fewer(name).module(torch.float64), ids, **given)
    assert torch.equal(generate(Decoder(cached(name), torch.float64), ids, **given), plain)


@pytest.mark.parametrize("name", ["text", "text, moved up", "text, no past"])
def test_drafted_tokens_are_those_of_plain_decoding(name: str) -> None:
    prompt = torch.tensor([3, 4, 2, 1, 3, 4, 2, 1, 3, 4])
    plain = generate(fewer(name).module(torch.float64), prompt[None], max_new_tokens=12)
    drafted = Speculator(Decoder(cached(name), torch.float64), Copy(2, 6), Fixed(4))
    found, log = drafted.generate(prompt, 12)
    assert torch.equal(found, plain[0])
    assert log.acceptance_rate > 0


def test_caches_without_past_are_as_short_as_the_last_stage() -> None:
    """Behind the prompt all layers hold what the last stage has left: bytes are as counted, and a text begins anew."""
    given, program = question(2), cached("pyramid, no past")
    decoder = Decoder(program)
    held = decoder.cache(2, 30, prompt=22, pixel_values=given["pixel_values"])
    whole = held.bytes()
    for _ in range(2):
        decoder.step(held, given["input_ids"])
        held.commit(22)
        assert held.bytes() == cost(program).at(B=2, S=22, C=30, P=22, I=2)["kv_bytes"]
        assert {buffer.shape[2] for buffer in held.buffers.values()} == {30 - ENTRIES + 2}
        held.truncate(0)
    assert whole > cost(program).at(B=2, S=22, C=30, P=22, I=2)["kv_bytes"]
    rest = cost(fewer("pyramid, no past")).at(B=2, S=22, I=2)["kv_bytes"]
    assert rest == cost(fewer("pyramid")).at(B=2, S=22, I=2)["kv_bytes_per_token"] * 2 * (6 + 2)


def test_words_see_in_no_layer_what_has_left() -> None:
    """A prompt's own results stay; words behind it see less than where earlier layers keep what leaves later."""
    given = question(1)
    prompt = torch.ones_like(given["input_ids"])
    ids = torch.cat([given["input_ids"], torch.tensor([[3, 4]])], 1)
    pixels = given["pixel_values"].double()
    with torch.no_grad():
        kept, lost = (
            with_prompt(fewer(name)).module(torch.float64)(input_ids=ids, pixel_values=pixels, prompt=prompt)[0]
            for name in ("pyramid", "pyramid, no past")
        )
    assert torch.equal(kept[:, :22], lost[:, :22])
    assert (kept[:, 22:] - lost[:, 22:]).abs().max() > 1e-3


def test_drafts_behind_a_picture() -> None:
    given = question(1)
    ids, pixels = given["input_ids"], given["pixel_values"].double()
    plain = generate(fewer("pyramid, no past").module(torch.float64), ids, max_new_tokens=8, pixel_values=pixels)
    decoder = Decoder(cached("pyramid, no past"), torch.float64)
    found, _ = Speculator(decoder, Copy(2, 6), Fixed(4)).generate(ids[0], 8, pixel_values=pixels)
    assert torch.equal(found, plain[0])
    with pytest.raises(PlanError, match="reads the tokens alone"):
        Speculator(decoder, Chain(decoder, part=True), Fixed(4)).generate(ids[0], 8, pixel_values=pixels)


def test_two_pictures_in_a_row() -> None:
    ids = question(1, text=8)["input_ids"]
    ids = torch.cat([ids, ids], 1)
    pixels = torch.cat([question(1)["pixel_values"], 5 * question(1, seed=1)["pixel_values"]]).double()
    plain = generate(fewer("pyramid").module(torch.float64), ids, max_new_tokens=6, pixel_values=pixels)
    decoder = Decoder(cached("pyramid"), torch.float64)
    assert torch.equal(generate(decoder, ids, max_new_tokens=6, pixel_values=pixels), plain)


def test_the_whole_text_as_prompt_is_the_program_itself() -> None:
    given = question(2)
    with torch.no_grad():
        ours, theirs = (each.module()(**given)[0] for each in (with_prompt(fewer("pyramid")), fewer("pyramid")))
    assert torch.equal(ours, theirs)


def test_words_behind_the_prompt_change_no_choice() -> None:
    given = question(1)
    prompt = torch.ones_like(given["input_ids"])
    run = with_prompt(fewer("from the encoder on")).module(torch.float64)
    left = []
    for word in (3, 70):
        ids = torch.cat([given["input_ids"], torch.full((1, 4), word)], 1)
        with torch.no_grad():
            left.append(run(input_ids=ids, pixel_values=given["pixel_values"].double(), prompt=prompt)[0] == 0)
    assert torch.equal(left[0], left[1])
    assert int(left[0].all(-1).sum()) == ENTRIES - ENTRIES // 4


@pytest.mark.parametrize("name", ["pyramid", "from the encoder on", "text"])
def test_bytes_are_those_of_the_formula(name: str) -> None:
    """What lies in memory is what the cost says, of the program with a cache and of that without one."""
    pictures = {} if name == "text" else {"pixel_values": question(2)["pixel_values"]}
    room, prompt = 40, 22
    held = Decoder(cached(name)).cache(2, room, prompt=prompt, **pictures)
    sizes = {"B": 2, "C": room, "P": prompt, **({} if name == "text" else {"I": 2})}
    assert held.bytes() == cost(cached(name)).at(**sizes, S=1)["kv_bytes"]
    whole = cost(fewer(name)).at(**{**sizes, "S": prompt})["kv_bytes"]
    assert held.bytes() == whole + 2 * (room - prompt) * cost(fewer(name)).kv_bytes_per_token


def test_as_many_entries_are_held_as_tokens_stay() -> None:
    given = question(2)
    decoder = Decoder(cached("pyramid"))
    held = decoder.cache(2, 30, prompt=22, pixel_values=given["pixel_values"])
    decoder.step(held, given["input_ids"])
    held.commit(22)
    assert [int(held.entries[f"entries_{i}"][0]) for i in (1, 2, 3)] == [6 + 8, 6 + 4, 6 + 2]
    decoder.step(held, torch.tensor([[3, 4], [5, 6]]))
    held.commit(2)
    assert [int(each[1]) for each in held.entries.values()] == [16, 12, 10]
    held.truncate(22)
    assert [int(each[1]) for each in held.entries.values()] == [14, 10, 8]
    with pytest.raises(ValueError, match="truncate to 0 in all rows, or behind it"):
        held.truncate(21)


def test_a_prompt_is_kept_whole_and_pictures_stand_in_it() -> None:
    given = question(1)
    decoder = Decoder(cached("pyramid"))
    held = decoder.cache(1, 60, prompt=22, pixel_values=given["pixel_values"])
    decoder.step(held, given["input_ids"])
    with pytest.raises(ValueError, match="leave a prompt as a whole"):
        held.commit(21)
    held.commit(22)
    with pytest.raises(ValueError, match="pictures stand in the prompt"):
        decoder.step(held, given["input_ids"])


def test_windows_behind_a_stage_are_declined() -> None:
    program = build(Shape(layers=2, window=3))
    views = Views(program)
    step = PassRegistry().get("drop_tokens").model_validate_json('{"span": "text", "layers": 1, "keep": "50%"}')
    program = apply_edits(program, views, step.plan(Context(views, (0, 1))).edits)
    made, why = with_cache(program)
    assert made is program
    assert "tokens have left, and its" in str(why)
