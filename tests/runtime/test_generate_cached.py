"""Generation with a cache: the tokens of transformers' generate, of the stateless loop, and what the arguments say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers

from graphopt.artifact import load, save
from graphopt.frontend import capture_model
from graphopt.runtime import Decoder, generate, with_cache
from graphopt.runtime.stages import Stage
from tests import tiny

FAMILIES = ("llama", "gpt2", "gemma2", "mistral", "bloom", "gptj", "opt", "neox", "falcon", "qwen3", "olmo2")
NEW = 10


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of unequal length, padded on the left."""
    ids, mask = tiny.tokens(3, 9, seed=4), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :7] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def decoder_of(model: Any) -> Decoder:
    """A decoder of a transformers model, in its own dtype."""
    program, reason = with_cache(capture_model(model))
    assert reason is None
    return Decoder(program, torch.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model = tiny.make_model(name)
    decoder = decoder_of(model)
    ids, mask = prompts()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    alone = model.generate(ids[:1], attention_mask=mask[:1], **options)
    assert torch.equal(generate(decoder, ids[:1], max_new_tokens=NEW), alone)
    theirs = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(generate(decoder, ids, padding=mask, max_new_tokens=NEW), theirs)


@pytest.mark.parametrize("name", tiny.TEXT_TO_TEXT)
def test_an_encoder_runs_once_and_its_text_is_continued_as_by_transformers(name: str) -> None:
    model = tiny.make_model(name)
    decoder = decoder_of(model)
    products = [n for n in decoder.lowered.order if n.target is torch.ops.aten.linear.default]
    late = [n for n in products if decoder.lowered.stage[n] == Stage.STEP]
    # A step multiplies by the logits' weight and, in two layers, by 4 for its own text, 2 for the other, 2 for neurons.
    assert len(late) == 2 * 8 + 1
    assert len(products) - len(late) == 2 * 6 + 2 * 2
    ids, mask = tiny.tokens(3, 9, seed=4), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, 2:] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    found = []
    for rows in (1, 3):
        given = {"input_ids": ids[:rows], "attention_mask": mask[:rows]}
        theirs = model.generate(**given, decoder_start_token_id=1, **options)
        found.append(generate(decoder, torch.ones(rows, 1, dtype=torch.long), max_new_tokens=NEW, **given))
        assert torch.equal(found[-1], theirs)
    assert len({tuple(row) for row in found[-1].tolist()}) > 1


@pytest.mark.parametrize("name", tiny.TEXT_TO_TEXT)
def test_transformers_generate_writes_about_another_text(name: str, tmp_path: Path) -> None:
    stock = tiny.make_model(name)
    program = capture_model(stock)
    ids, mask = tiny.tokens(3, 9, seed=4), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, 2:] = 0, 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 7}
    for kind, made in (("cached", with_cache(program)[0]), ("stateless", program)):
        save(made, tmp_path / kind, format="graphopt")
        ours = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / kind)
        for more in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            assert torch.equal(ours.generate(**given, **options, **more), stock.generate(**given, **options, **more))
        written = tiny.tokens(3, 4, seed=5)
        found = ours(**given, decoder_input_ids=written).logits
        torch.testing.assert_close(found, stock(**given, decoder_input_ids=written).logits, rtol=1e-3, atol=1e-4)
        with pytest.raises(TypeError, match="input_ids is missing"):
            ours.generate(max_new_tokens=1)


def whisper() -> Any:
    """A random model of two layers that writes down sound."""
    sizes = {f"{stack}_{size}": n for stack in ("encoder", "decoder") for size, n in (("layers", 2), ("ffn_dim", 56))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        **sizes,
        **heads,
        **words,
        vocab_size=96,
        d_model=32,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=64,
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model


def test_sound_is_encoded_once_and_written_down_as_by_transformers(tmp_path: Path) -> None:
    model = whisper()
    program = capture_model(model)
    decoder = Decoder(with_cache(program)[0], torch.float32)
    products = [n for n in decoder.lowered.order if n.target is torch.ops.aten.linear.default]
    late = [n for n in products if decoder.lowered.stage[n] == Stage.STEP]
    assert (len(late), len(products) - len(late)) == (2 * 8 + 1, 2 * 6 + 2 * 2)
    sound, start = torch.randn(3, 16, 40), torch.ones(3, 1, dtype=torch.long)
    # What Whisper's own generate adds, tokens of tasks and times, is not asked for.
    options = {"decoder_start_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    theirs = transformers.GenerationMixin.generate(model, input_features=sound, do_sample=False, **options)
    assert torch.equal(generate(decoder, start, max_new_tokens=NEW, input_features=sound), theirs)
    assert len({tuple(row) for row in theirs.tolist()}) > 1
    assert save(program, tmp_path / "stateless").format == "graphopt"
    save(decoder.program, tmp_path / "cached", format="graphopt")
    for kind in ("stateless", "cached"):
        ours = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / kind)
        assert torch.equal(ours.generate(input_features=sound, do_sample=False, **options), theirs)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Decoder]:
    """One model and its decoder."""
    model = tiny.make_model("llama")
    return model, decoder_of(model)


def test_the_repetition_penalty_is_that_of_transformers(llama: tuple[Any, Decoder]) -> None:
    model, decoder = llama
    ids = tiny.tokens(2, 6)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    plain = generate(decoder, ids, max_new_tokens=NEW)
    for penalty in (1.3, 3.0):
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=penalty, **options)
        ours = generate(decoder, ids, max_new_tokens=NEW, repetition_penalty=penalty)
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, plain)


def test_a_seed_decides_and_the_reference_draws_the_same(llama: tuple[Any, Decoder]) -> None:
    _, decoder = llama
    ids, mask = prompts()
    options: dict[str, Any] = {"padding": mask, "max_new_tokens": NEW, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    drawn = [generate(decoder, ids, seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(generate(tiny.program("llama"), ids, seed=1, **options), drawn[0])


def test_processors_see_text_and_logits_in_turn(llama: tuple[Any, Decoder]) -> None:
    _, decoder = llama
    ids, lengths = tiny.tokens(2, 5), []

    def forbid(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        lengths.append(text.shape[1])
        return logits.index_fill(1, torch.arange(10, 96), -torch.inf)

    def prefer(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(96) == 50, logits + 1e9, logits)

    new = generate(decoder, ids, max_new_tokens=4, processors=(forbid, prefer))[:, 5:]
    assert bool((new < 10).all())
    assert lengths == [5, 6, 7, 8]


def test_a_row_stops_at_its_stop_string(llama: tuple[Any, Decoder]) -> None:
    _, decoder = llama
    ids = tiny.tokens(1, 5)
    free = generate(decoder, ids, max_new_tokens=NEW)[0, 5:].tolist()
    word = f"<{free[2]}><{free[3]}>"
    shown: list[int] = []
    stopped = generate(
        decoder, ids, max_new_tokens=NEW, stop=("none", word), decode=lambda t: "".join(f"<{i}>" for i in t),
        stream=lambda token: shown.append(int(token[0])),
    )  # fmt: skip
    assert stopped[0, 5:].tolist() == free[:4] == shown
    with pytest.raises(ValueError, match="decode"):
        generate(decoder, ids, max_new_tokens=1, stop=("x",))


def test_transformers_generate_uses_the_cache_of_our_checkpoint(tmp_path: Path) -> None:
    tiny.checkpoint(tmp_path / "stock", "llama_mha")
    program, _ = with_cache(load(tmp_path / "stock"))
    assert save(program, tmp_path / "ours").format == "graphopt"
    ours, stock = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "stock"))
    ids, mask = prompts()
    steps: list[int] = []
    ours.register_forward_pre_hook(lambda _, args, given: steps.append(given["input_ids"].shape[1]), with_kwargs=True)
    for options in (
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True},
        {"use_cache": False},
    ):
        found = []
        for model in (ours, stock):
            torch.manual_seed(3)
            found.append(model.generate(ids, attention_mask=mask, max_new_tokens=7, **options))
        assert torch.equal(*found), options
    assert steps[:3] == [9, 1, 1]
    assert torch.equal(load(tmp_path / "ours").module()(input_ids=ids)[0], program.module()(input_ids=ids)[0])
    with torch.no_grad():
        ours.get_parameter("model.norm.weight").mul_(-1)
        stock.model.norm.weight.mul_(-1)
    again = [m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (ours, stock)]
    assert torch.equal(*again)
    ours(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
