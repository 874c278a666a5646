"""The speculative loop on tiny models: tokens, caches and counts are those of plain decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from graphopt.runtime import generate
from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.speculate import Fixed, Rows, Speculator, Tree
from tests.speculative.models import Guesser, decoder
from tests.tiny import program, tokens

NAMES = ("llama", "gpt2", "gemma2", "bloom")
PROMPT = tokens(1, 5, seed=3)[0]


def plain(name: str, count: int, eos: int | None = None) -> list[int]:
    """What the stateless graph says."""
    run = program(name).module(torch.float64)
    found: list[int] = generate(run, PROMPT[None], max_new_tokens=count, eos=eos)[0].tolist()  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_caches_are_those_of_plain_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plain(name, 24)
    run, caches = decoder(name), []
    true_commit = Cache.commit

    def commit(self: Cache, kept: int | torch.Tensor) -> None:
        true_commit(self, kept)
        caches.append((int(self.lengths[0]), {k: v.clone() for k, v in self.buffers.items()}))

    monkeypatch.setattr(Cache, "commit", commit)
    for seed, budget in ((0, 7), (1, 12)):
        drafter = Guesser(wanted, seed=seed)
        caches.clear()
        got, log = Speculator(run, drafter, Fixed(budget)).generate(PROMPT, 24)
        assert got.tolist() == wanted
        assert log.emitted == 24 == 1 + len(log.steps) + sum(event.accepted for event in log.steps)
        assert 1 < log.tau <= budget
        for length, buffers in caches:
            fresh = run.cache(1, length)
            with torch.no_grad():
                run.step(fresh, torch.tensor([wanted[:length]]))
            for key, buffer in fresh.buffers.items():
                torch.testing.assert_close(buffers[key][:, :, :length], buffer, rtol=1e-9, atol=1e-9)
        assert caches[-1][0] == len(wanted) - 1
        assert [len(path) for _, path in drafter.seen] == [event.emitted for event in log.steps]


@pytest.mark.parametrize("name", NAMES)
def test_tree_rows_equal_the_ends_of_their_paths(name: str) -> None:
    run = decoder(name)
    tree = Guesser([], seed=5).propose(7, 20)
    cache = run.cache(1, 64)
    with torch.no_grad():
        run.step(cache, PROMPT[None])
        cache.commit(len(PROMPT))
        got = run.step(cache, torch.tensor([tree.token]), parents=[tree.parent])[0][0]
        whole = program(name).module(torch.float64)
        for node in range(len(tree)):
            path = torch.tensor([tree.token[n] for n in tree.path(node)])
            expected = whole(input_ids=torch.cat([PROMPT, path])[None])[0][0, -1]
            torch.testing.assert_close(got[node], expected, rtol=1e-9, atol=1e-9)


def test_nothing_follows_a_stop_and_nothing_exceeds_the_limit() -> None:
    wanted = plain("llama", 24)
    for stop in dict.fromkeys(wanted[5:]):
        expected = plain("llama", 24, eos=stop)
        for seed in range(3):
            got, log = Speculator(decoder("llama"), Guesser(wanted, seed=seed), Fixed(9)).generate(PROMPT, 24, stop)
            assert got.tolist() == expected
            assert all(event.emitted >= 1 for event in log.events)
    for count in (0, 1, 2, 3, 11):
        streamed: list[int] = []
        got, log = Speculator(decoder("llama"), Guesser(wanted), Fixed(9)).generate(
            PROMPT, count, stream=streamed.append
        )
        assert got.tolist() == wanted[: 5 + count]
        assert streamed == wanted[5 : 5 + count]
        assert log.emitted == count


def test_a_budget_of_one_asks_no_drafter_and_is_plain_decoding() -> None:
    class Silent(Guesser):
        def propose(self, root: int, budget: int) -> Tree:
            raise AssertionError("asked for a proposal")

        def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
            super().observe(rows, path)
            assert path == tuple(range(len(path)))
            self.told += rows.token
            assert rows.first == len(path) - 1
            assert torch.equal(rows.of("logits", len(path) - 1), rows.outputs["logits"][-1])

        told: tuple[int, ...] = ()

    wanted = plain("gpt2", 40)
    for drafter in (Silent([]), None):
        streamed: list[int] = []
        got, log = Speculator(decoder("gpt2"), drafter, Fixed(1)).generate(PROMPT, 40, stream=streamed.append)
        assert got.tolist() == wanted
        assert log.tau == 1
        assert all(event.rows == 1 for event in log.steps)
        assert streamed == wanted[5:]
        if drafter is not None:
            assert list(drafter.told) == wanted[5:-1]


def test_of_plain_steps_in_a_row_only_the_results_that_a_drafter_reads_are_kept() -> None:
    class Late(Guesser):
        reads = 3

    @dataclass(frozen=True)
    class Resting(Fixed):
        steps: int

        def pause(self) -> int:
            return self.steps

    for pause, first in ((8, 5), (9, 6), (10, 7), (1000, 7)):
        drafter = Late([])
        got, _ = Speculator(decoder("gpt2"), drafter, Resting(4, pause)).generate(PROMPT, 9)
        ((rows, path),) = drafter.seen
        assert len(path) == len(rows.token) == 8
        assert rows.first == first
        assert rows.logits.argmax(-1).tolist() == got.tolist()[first - 8 :]
        assert int(rows.of("logits", 7).argmax()) == got.tolist()[-1]


def test_the_cache_is_as_large_as_that_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, asked, true = plain("llama", 24), list[int](), Decoder.cache

    def cache(self: Decoder, batch: int, capacity: int, **options: Any) -> Cache:
        asked.append(capacity)
        return true(self, batch, capacity, **options)

    monkeypatch.setattr(Decoder, "cache", cache)
    generate(decoder("llama"), PROMPT[None], max_new_tokens=24)
    got, log = Speculator(decoder("llama"), Guesser(wanted), Fixed(9)).generate(PROMPT, 24)
    assert asked == [29, 29]
    assert got.tolist() == wanted
    left = 23
    for event in log.steps:
        assert event.rows <= left
        left -= event.emitted
