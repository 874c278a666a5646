"""Decoding with a cache equals the stateless run: every step, ragged rows, token trees, and what the cache then holds."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from graphopt.ir.program import Program
from graphopt.ir.run import Runner
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.with_cache import with_cache
from tests import tiny

FAMILIES = ("llama", "gpt2", "gemma2", "mistral", "bloom", "gptj", "opt", "neox", "phi", "falcon", "qwen3", "cohere")
ROUTED = ("mixtral", "qwen3_moe", "gpt_oss")
# Sums of a few hundred products in float64, through three layers.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@cache
def cached(name: str) -> Program:
    """A tiny model with a cache."""
    return with_cache(tiny.program(name))[0]


@cache
def pair(name: str) -> tuple[Decoder, Runner]:
    """The decoder of a tiny model and the stateless reference."""
    return Decoder(cached(name), torch.float64), Runner(tiny.program(name), torch.float64, "cpu")


def whole(run: Runner, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a text by the stateless program."""
    with torch.no_grad():
        result: torch.Tensor = run(input_ids=ids)[0]
    return result


@pytest.mark.parametrize("name", [*FAMILIES, *ROUTED])
def test_every_step_equals_the_stateless_run_and_a_fresh_prefill(name: str) -> None:
    decoder, run = pair(name)
    ids = tiny.tokens(2, 20)
    expected = whole(run, ids)
    held, start = decoder.cache(2, 24), 0
    for count in (6, 1, 1, 3, 1, 8):
        logits = decoder.step(held, ids[:, start : start + count])[0]
        torch.testing.assert_close(logits, expected[:, start : start + count], **CLOSE)
        held.commit(count)
        start += count
        fresh = decoder.cache(2, 24)
        decoder.step(fresh, ids[:, :start])
        for key, buffer in held.buffers.items():
            torch.testing.assert_close(buffer[:, :, :start], fresh.buffers[key][:, :, :start], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_unequal_length(name: str) -> None:
    decoder, run = pair(name)
    ids, lengths = tiny.tokens(3, 18), torch.tensor([5, 9, 2])
    held = decoder.cache(3, 20)
    expected = [whole(run, row[None])[0] for row in ids]
    logits = decoder.step(held, ids[:, :9])[0]
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(logits[row, :length], expected[row][:length], **CLOSE)
    held.commit(lengths)
    for count in (1, 2, 1):
        at = held.lengths[:, None] + torch.arange(count)
        logits = decoder.step(held, ids.gather(1, at))[0]
        for row in range(3):
            torch.testing.assert_close(logits[row], expected[row][at[row]], **CLOSE)
        held.commit(count)


def closure(parents: list[int]) -> torch.Tensor:
    """Ancestors of each node of a tree, itself included."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "gpt2"])
@pytest.mark.parametrize("lengths", [(6, 4), (6, 6)])
def test_a_tree_gives_the_logits_of_each_path_and_its_accepted_path_stays(name: str, lengths: tuple[int, int]) -> None:
    decoder, run = pair(name)
    ids, generator = tiny.tokens(2, 6), torch.Generator().manual_seed(3)
    for size in (1, 4, 17):
        parents = [-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, size)]
        seen = closure(parents)
        nodes = tiny.tokens(2, size, seed=size)
        held = decoder.cache(2, 40)
        decoder.step(held, ids)
        held.commit(torch.tensor(lengths))
        logits = decoder.step(held, nodes, parents=[tuple(parents)])[0]
        paths = torch.full((2, size), -1)
        texts = []
        for row, length in enumerate(lengths):
            for node in range(size):
                path = seen[node].nonzero()[:, 0]
                text = torch.cat([ids[row, :length], nodes[row, path]])
                torch.testing.assert_close(logits[row, node], whole(run, text[None])[0, -1], **CLOSE)
            path = seen[size - 1 - row * (size // 2)].nonzero()[:, 0]
            paths[row, : len(path)] = path
            texts.append(torch.cat([ids[row, :length], nodes[row, path]]))
        held.commit(paths)
        more = tiny.tokens(2, 1, seed=9)
        logits = decoder.step(held, more)[0]
        for row, text in enumerate(texts):
            assert int(held.lengths[row]) == len(text)
            torch.testing.assert_close(logits[row, 0], whole(run, torch.cat([text, more[row]])[None])[0, -1], **CLOSE)


@pytest.mark.parametrize("large", [0, 2**40])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_packed_weights_give_the_same_products(name: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.runtime.lower._LARGE", large)
    decoder, ids = Decoder(cached(name), torch.float32), tiny.tokens(1, 12)
    expected = whole(pair(name)[1], ids)
    held, start = decoder.cache(1, 16), 0
    for count in (5, 1, 4, 2):
        logits = decoder.step(held, ids[:, start : start + count])[0]
        torch.testing.assert_close(logits.double(), expected[:, start : start + count], rtol=1e-4, atol=1e-4)
        held.commit(count)
        start += count


def test_truncated_and_reordered_rows_go_on_as_if_nothing_else_had_been() -> None:
    decoder, run = pair("llama")
    ids = tiny.tokens(2, 9)
    held = decoder.cache(2, 12)
    decoder.step(held, ids)
    held.commit(9)
    held.truncate(torch.tensor([5, 7]))
    held.reorder(torch.tensor([1, 0]))
    logits = decoder.step(held, ids[:, :1])[0]
    for row, (source, length) in enumerate(((1, 7), (0, 5))):
        text = torch.cat([ids[source, :length], ids[row, :1]])
        torch.testing.assert_close(logits[row, 0], whole(run, text[None])[0, -1], **CLOSE)


def test_misuse_is_refused() -> None:
    decoder, _ = pair("llama")
    held = decoder.cache(1, 4)
    with pytest.raises(ValueError, match="do not fit"):
        decoder.step(held, tiny.tokens(1, 5))
    decoder.step(held, tiny.tokens(1, 4))
    for kept in (5, -1, torch.tensor([[1, 1]]), torch.tensor([[0, -1, 2]])):
        with pytest.raises(ValueError, match=r"fit|path"):
            held.commit(kept)
    held.commit(2)
    with pytest.raises(ValueError, match="cannot be cut"):
        held.truncate(3)
    with pytest.raises(Exception, match="no cache"):
        Decoder(tiny.program("llama"))


def test_bytes_are_those_of_the_formula() -> None:
    decoder, _ = pair("llama")
    # 3 layers, 2 KV heads of 8, keys and values, 8 bytes.
    assert decoder.cache(2, 10).bytes() == 2 * 10 * 3 * 2 * 8 * 2 * 8
