"""Quantised caches: the packed cache equals the rounded text at every step, and its bytes are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.compiler.verify import tolerance
from graphopt.compiler.verify_decode import verify_decode
from graphopt.cost import cost
from graphopt.ir.program import Program
from graphopt.ops import quantised_attention
from graphopt.ops.packed import first_exact
from graphopt.ops.quantised import pack, unpack
from graphopt.passes.cache.bound_cache import BoundCache
from graphopt.passes.cache.insert_cache import InsertCache
from graphopt.passes.cache.quantize_cache import QuantizeCache
from graphopt.passkit import Context, Pass, Plan
from graphopt.passkit.edits import apply_edits
from graphopt.runtime import generate
from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.views import Views
from tests.tiny import program

GRIDS: dict[str, dict[str, Any]] = {
    "2 bits": {"bits": 2, "group": 8, "recent": 8},
    "4 bits, longer blocks": {"bits": 4, "group": 16, "recent": 9},
    "8 bits, longer ring": {"bits": 8, "group": 8, "recent": 20},
}
PROMPTS = ((1, 1), (3, 17), (41, 22))
VOCABULARY = 96


def change(before: Program, config: Pass) -> tuple[Program, Plan]:
    """A program after one pass, and the plan."""
    views = Views(before)
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    return (apply_edits(before, views, plan.edits, config.name) if plan.edits else before), plan


def quantised(name: str, grid: str) -> tuple[Program, Program]:
    """A tiny model with rounded keys and values: stateless, and with a packed cache."""
    text, plan = change(program(name), QuantizeCache.model_validate(GRIDS[grid]))
    assert plan.edits
    return text, change(text, InsertCache())[0]


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to float64's rounding of sums as long as the model is wide."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance(torch.float64, 128 * 3), error


def drawn(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """One group on the grid from its least to its largest value."""
    low, step = values.min(), (values.max() - values.min()) / (2**bits - 1)
    return low + step * ((values - low) / step).round()


@pytest.mark.parametrize("padded", [False, True])
def test_the_op_is_kivi_read_token_by_token(padded: bool) -> None:
    bits, group, recent, count, size, width = 2, 8, 9, 37, 4, 12
    q, k, v = drawn(1, 2, count, size), drawn(1, 1, count, size, seed=1), drawn(1, 1, count, width, seed=2)
    mask = torch.ones(1, count, dtype=torch.bool)
    if padded:
        mask[0, :5] = False
    got = quantised_attention(q, k, v, mask, None, 0.5, True, None, None, bits, group, recent)
    start = 5 if padded else 0
    keys, values = k[0, 0, start:], v[0, 0, start:]
    for now in range(len(keys)):
        seen_keys, seen_values = keys[: now + 1].clone(), values[: now + 1].clone()
        for first in range(0, now + 1, group):
            if first + group <= now + 1 - recent:
                for feature in range(size):
                    seen_keys[first : first + group, feature] = rounded(keys[first : first + group, feature], bits)
                for token in range(first, first + group):
                    for part in (slice(0, group), slice(group, width)):
                        seen_values[token, part] = rounded(values[token, part], bits)
        for head in range(2):
            weights = torch.softmax(seen_keys @ q[0, head, start + now] * 0.5, 0)
            close(got[0, head, start + now], weights @ seen_values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_in_their_bits_lowest_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 11), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    for row, held in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = sum(byte << 8 * i for i, byte in enumerate(held))
        assert [whole >> bits * i & 2**bits - 1 for i in range(11)] == row
    assert torch.equal(unpack(packed, bits, 11), codes)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_packed_cache_equals_the_rounded_text_at_every_step(grid: str) -> None:
    text_program, packed = quantised("llama", grid)
    whole, decoder = text_program.module(torch.float64), Decoder(packed, torch.float64)
    for lengths in PROMPTS:
        text = torch.randint(0, VOCABULARY, (2, max(lengths) + 22), generator=torch.Generator().manual_seed(1))
        cache = decoder.cache(2, text.shape[1])
        with torch.no_grad():
            wanted = [whole(input_ids=text[row : row + 1])[0][0] for row in range(2)]
        got = decoder.step(cache, text[:, : max(lengths)])[0]
        for row, length in enumerate(lengths):
            close(got[row, :length], wanted[row][:length])
        cache.commit(torch.tensor(lengths))
        for piece in (1, 1, 4, 1, 12, 3, 1):
            at = cache.lengths[:, None] + torch.arange(piece)
            got = decoder.step(cache, text.gather(1, at))[0]
            for row, start in enumerate(cache.lengths.tolist()):
                close(got[row], wanted[row][start : start + piece])
            # What is not committed leaves no trace.
            cache.commit(max(1, piece - 1))


def test_certificates_hold_and_trees_are_taken_in() -> None:
    for name in ("llama", "qwen3"):
        text, packed = quantised(name, "2 bits")
        assert verify_decode(text, packed, None, "insert_cache")["pieces"][-1] == "tree"
    text, packed = quantised("llama", "2 bits")
    whole, decoder = text.module(torch.float64), Decoder(packed, torch.float64)
    ids = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(2))
    cache = decoder.cache(1, 48)
    decoder.step(cache, ids[:, :22])
    cache.commit(22)
    path = [0, 2, 4]
    tree = decoder.step(cache, ids[:, 22:27], parents=[(-1, 0, 0, 1, 2)])[0]
    joined = torch.cat([ids[:, :22], ids[:, 22:27][:, path], ids[:, 27:]], 1)
    wanted = whole(input_ids=joined)[0][0]
    close(tree[0, path], wanted[22:25])
    # The path fills a block whose other tokens were committed before.
    cache.commit(torch.tensor([path]))
    close(decoder.step(cache, ids[:, 27:])[0][0], wanted[25:])
    with pytest.raises(ValueError, match="may be 8 deep"):
        decoder.step(cache, ids[:, :20], parents=[(*range(-1, 18), 17)])
    with pytest.raises(ValueError, match="cannot go back"):
        cache.truncate(20)


def test_generation_with_unequal_prompts_equals_the_rounded_text() -> None:
    text, packed = quantised("llama", "2 bits")
    ids = torch.randint(3, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(4))
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    ids = ids * padding
    assert torch.equal(
        generate(packed, ids, padding=padding, max_new_tokens=9), generate(text, ids, padding=padding, max_new_tokens=9)
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_bytes_are_those_of_the_formula(grid: str) -> None:
    text, packed = quantised("llama", grid)
    bits, group, recent = GRIDS[grid].values()
    layers, kv_heads, size, capacity = 3, 2, 8, 200
    keys = size * (group * bits // 8 + 2 * 4)
    values = group * (size * bits // 8 + 2 * 4 * (-(-size // group)))
    formula = 3 * layers * kv_heads * (capacity // group * (keys + values) + (recent + group) * 2 * size * 4)
    assert Cache(packed, 3, capacity, torch.float32).bytes() == formula
    assert cost(text).at(B=3, S=capacity)["kv_bytes"] == cost(packed).at(B=3, S=1, C=capacity)["kv_bytes"] == formula


def test_a_text_within_the_last_tokens_is_as_it_was() -> None:
    text, _ = quantised("llama", "8 bits, longer ring")
    ids = torch.randint(0, VOCABULARY, (2, 27), generator=torch.Generator().manual_seed(5))
    close(text.module(torch.float64)(input_ids=ids)[0], program("llama").module(torch.float64)(input_ids=ids)[0])
    assert first_exact(torch.arange(40), 8, 20).tolist() == [0] * 27 + [8] * 8 + [16] * 5


def test_what_cannot_be_quantised_is_declined_in_words() -> None:
    def reasons(source: Program, config: Pass) -> str:
        return " ".join(d.reason for d in change(source, config)[1].declines)

    assert "window of 8" in reasons(program("mistral"), QuantizeCache())
    assert "cannot be told from its mask" in reasons(program("bloom"), QuantizeCache())
    text, packed = quantised("llama", "2 bits")
    assert "quantised already" in reasons(text, QuantizeCache())
    assert "quantised already" in reasons(text, BoundCache())
    assert "has a cache already" in reasons(packed, QuantizeCache())
    assert "bounded" in reasons(change(program("llama"), BoundCache(recent=4))[0], QuantizeCache())
