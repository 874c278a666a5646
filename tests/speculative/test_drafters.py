"""Drafters: whatever they propose, decoding is plain decoding; what they propose is what their method says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from graphopt.ir.program import Applied
from graphopt.passes.speculative.insert_exit import InsertExit
from graphopt.passes.speculative.insert_heads import InsertHeads
from graphopt.passes.speculative.speculate import Speculate
from graphopt.passkit import Context
from graphopt.passkit.drafting import Drafting
from graphopt.passkit.edits import apply_edits
from graphopt.passkit.speculation import Speculation
from graphopt.runtime.speculate import Event, Fixed, Rows, Speculator, Tree
from graphopt.runtime.speculate.accept import Exact, sampling_law
from graphopt.runtime.speculate.copying import Copy
from graphopt.runtime.speculate.drafter import Drafter
from graphopt.runtime.speculate.network import Chain, Sampled
from graphopt.runtime.speculate.recycling import Recycle
from graphopt.runtime.speculate.setup import drafting_of, speculator
from graphopt.runtime.speculate.skipping import Skipping, without
from graphopt.views import Views
from tests.speculative.models import decoder, insert_cache
from tests.tiny import program, tokens

PROMPT = tokens(1, 9, seed=3)[0]
KINDS = ("copy", "recycle", "copy or recycle", "chain", "own chain", "skip", "constant", "beam", "own sampled")


def rows(words: list[int], vocabulary: int = 8, cache: object = None) -> Rows:
    """Rows of a chain whose logits make each word's successor likeliest, then the numbers behind it."""
    logits = torch.zeros(len(words), vocabulary)
    for i, word in enumerate(words):
        for rank in range(vocabulary):
            logits[i, (word + 1 + rank) % vocabulary] = -float(rank)
    return Rows(tuple(words), tuple(range(-1, len(words) - 1)), (logits[None],), ("logits",), cache)  # type: ignore[arg-type]


def make(kind: str, name: str) -> Drafter:
    """A drafter of each kind for a tiny model."""
    run, generator = decoder(name), torch.Generator().manual_seed(0)
    law = sampling_law(1.0)
    match kind:
        case "copy":
            return Copy(match=1, length=4)
        case "recycle":
            return Recycle(4)
        case "copy or recycle":
            return Copy(match=2, fallback=Recycle())
        case "chain":
            return Chain(run, part=True, stop=0.0)
        case "own chain":
            return Chain(run, part=False, stop=0.0, leaves=True)
        case "skip":
            return Skipping(run.program, torch.float64, skip=0.5, context=4)
        case "constant" | "beam":
            return Sampled(run, law, generator, part=True, branching=(3, 2), mode=kind)
        case _:
            return Sampled(run, law, generator, part=False, branching=(2, 2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_plain_decoding(kind: str) -> None:
    name = "llama"
    wanted, _ = Speculator(decoder(name)).generate(PROMPT, 24)
    drafter = make(kind, name)
    for budget in (12, 5, 2):
        got, log = Speculator(decoder(name), drafter, Fixed(budget)).generate(PROMPT, 24)
        assert got.tolist() == wanted.tolist()
        assert max(event.rows for event in log.steps) <= budget
    if kind in ("chain", "own chain"):
        # The draft is the program itself: a chain of one drafted token is always right.
        assert log.tau == pytest.approx(23 / 12)


@pytest.mark.parametrize("kind", ["chain", "skip", "beam"])
def test_a_draft_in_the_shared_cache_leaves_it_as_a_fresh_prefill(kind: str) -> None:
    run = decoder("llama")
    drafter = make(kind, "llama")
    caches = []
    begin = drafter.begin

    def hold(prompt: tuple[int, ...], rows: Rows) -> None:
        caches.append(rows.cache)
        begin(prompt, rows)

    drafter.begin = hold  # type: ignore[method-assign]
    text, _ = Speculator(run, drafter, Fixed(6)).generate(PROMPT, 20)
    length = int(caches[0].lengths[0])
    fresh = run.cache(1, length)
    run.step(fresh, text[None, :length])
    for name, buffer in fresh.buffers.items():
        torch.testing.assert_close(caches[0].buffers[name][:, :, :length], buffer, rtol=1e-9, atol=1e-9)


def test_copies_are_what_a_search_of_the_text_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    for occurrence in ("first", "last"):
        text = torch.randint(0, 3, (60,), generator=generator).tolist()
        drafter = Copy(match=2, length=5, occurrence=occurrence)  # type: ignore[arg-type]
        drafter.begin(tuple(text[:4]), rows(text[:4]))
        for at in range(4, len(text)):
            tree = drafter.propose(text[at], 8)
            known = text[: at + 1]
            found = [i for i in range(2, len(known)) if known[i - 2 : i] == known[-2:]]
            assert tree.token[0] == text[at]
            if found:
                place = found[0] if occurrence == "first" else found[-1]
                copied = list(known)
                for i in range(5):
                    copied.append(copied[place + i])
                assert list(tree.token[1:]) == copied[len(known) :]
            else:
                assert len(tree) == 1
            drafter.observe(rows([text[at]]), (0,))
        drafter.truncate(10)
        assert drafter.tokens == text[:10]


def test_a_loop_is_copied_whole() -> None:
    drafter = Copy(match=3, length=10)
    loop = [1, 2, 3, 4] * 3
    drafter.begin(tuple(loop), rows(loop))
    assert drafter.propose(1, 11).token == (1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3)


def test_a_table_line_is_the_top_of_the_last_row_of_its_token() -> None:
    drafter = Recycle(3)
    drafter.begin((0, 1), rows([0, 1]))
    assert drafter.table == {0: [1, 2, 3], 1: [2, 3, 4]}
    assert set(drafter.propose(5, 30).token) == {5}, "nothing is known behind 5"
    tree = drafter.propose(0, 30)
    for node, above in enumerate(tree.parent[1:], start=1):
        assert tree.token[node] in drafter.table[tree.token[above]]
    # Two rows of token 4: the deeper one counts, kept or not, although it stands first.
    logits = torch.zeros(4, 8)
    logits[1, 6], logits[2, 5], logits[3, 7] = 3, 3, 3
    drafter.observe(Rows((0, 1, 4, 4), (-1, 0, 0, 1), (logits[None],), ("logits",), None), (0,))  # type: ignore[arg-type]
    assert drafter.table[4][0] == 7
    drafter.observe(Rows((0, 4, 4), (-1, 0, 1), (logits[None, :3],), ("logits",), None), (0,))  # type: ignore[arg-type]
    assert drafter.table[4][0] == 5


def test_a_second_reading_drafts_no_worse() -> None:
    drafter = Recycle()
    first = Speculator(decoder("llama"), drafter, Fixed(16)).generate(PROMPT, 24)[1].tau
    assert Speculator(decoder("llama"), drafter, Fixed(16)).generate(PROMPT, 24)[1].tau >= first


def test_an_unsure_chain_stops_behind_the_unsure_token() -> None:
    for stop, length in ((0.0, 4), (1.1, 1)):
        drafter = Chain(decoder("llama"), part=True, length=4, stop=stop)
        trees: list[Tree] = []
        propose = drafter.propose
        drafter.propose = lambda root, budget, p=propose, t=trees: t.append(p(root, budget)) or t[-1]  # type: ignore
        Speculator(decoder("llama"), drafter, Fixed(9)).generate(PROMPT, 9)
        # The last tree has no more nodes than tokens are left.
        assert {len(tree) for tree in trees[:-1]} == {length + 1}
        assert len(trees[-1]) <= length + 1


def test_the_search_never_forgets_a_better_set_and_is_a_function_of_the_seed() -> None:
    found = []
    for _ in range(2):
        drafter = Skipping(decoder("gpt2").program, torch.float64, skip=0.5, context=4, seed=3)
        scores = []
        for seed in range(3):
            Speculator(decoder("gpt2"), drafter, Fixed(6)).generate(tokens(1, 6, seed=seed)[0], 20)
            scores.append(drafter.score)
        assert scores == sorted(scores)
        assert scores[-1] >= 0
        assert len(drafter.best) == len(drafter.places) // 2
        found.append(drafter.best)
    assert found[0] == found[1]


def test_a_gated_copy_with_open_gates_is_the_program() -> None:
    drafter = Skipping(decoder("llama").program, torch.float64, skip=0.5, context=4)
    Speculator(decoder("llama"), drafter, Fixed(2)).generate(PROMPT, 8)
    assert drafter._agreement(frozenset(), int(drafter.tokens[-1])) >= 3 / 4  # the last wanted token is made up here


def test_drawn_siblings_are_distinct_and_q_is_what_they_were_drawn_from() -> None:
    run = decoder("llama")
    law = sampling_law(1.0)
    for mode in ("constant", "beam"):
        drafter = Sampled(run, law, torch.Generator().manual_seed(0), part=True, branching=(3, 3), mode=mode)  # type: ignore[arg-type]
        trees: list[Tree] = []
        propose = drafter.propose
        drafter.propose = lambda root, budget, p=propose, t=trees: t.append(p(root, budget)) or t[-1]  # type: ignore
        Speculator(run, drafter, Fixed(13)).generate(PROMPT, 20)
        for tree in trees[:3]:
            assert tree.q is not None
            assert len(tree) == (13 if mode == "constant" else 7)
            for node, children in enumerate(tree.children):
                if children:
                    assert float(tree.q[node].sum()) == pytest.approx(1)
                    assert all(float(tree.q[node, tree.token[child]]) > 0 for child in children)


@pytest.mark.parametrize("mode", ["constant", "beam"])
def test_recursive_rejection_keeps_the_law_of_plain_sampling(mode: str) -> None:
    # Two tokens behind a prompt, from toy tables: p of the program, q of the draft, six words.
    words, runs = 6, 6000
    seeded = torch.Generator().manual_seed(7)
    p = torch.softmax(1.5 * torch.randn(words, words, generator=seeded, dtype=torch.float64), -1)
    q = torch.softmax(1.5 * torch.randn(words, words, generator=seeded, dtype=torch.float64), -1)
    generator = torch.Generator().manual_seed(11)
    law = sampling_law(1.0)
    drafter = Sampled(decoder("llama"), law, generator, part=True, branching=(2, 2), mode=mode)  # type: ignore[arg-type]
    drafter.catch_up = lambda: None  # type: ignore[assignment,method-assign,return-value]
    drafter.read = lambda tokens, parent=None: q[list(tokens)].log()  # type: ignore[method-assign]
    accept = Exact(law, generator)
    counts = torch.zeros(words, words)
    for _ in range(runs):
        emitted: list[int] = []
        root = 0
        while len(emitted) < 2:
            tree = drafter.propose(root, 9)
            path, token = accept(tree, p[list(tree.token)].log())
            emitted += [*(tree.token[node] for node in path[1:]), token]
            root = token
        counts[emitted[0], emitted[1]] += 1
    expected = runs * p[0][:, None] * p
    chi = float(((counts - expected) ** 2 / expected).sum())
    # 35 degrees of freedom: 66.6 is passed by one law-abiding run in a thousand.
    assert chi < 66.6


def test_the_draft_of_a_skipped_program_reads_the_shared_cache() -> None:
    run = decoder("llama")
    short = without(run.program, 0.5)
    assert {spec.name for spec in short.entry.inputs} <= {spec.name for spec in run.program.entry.inputs}
    assert len(short.weights) < len(run.program.weights)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_an_exit_leaves_the_program_as_it_was_and_drafts_from_its_first_blocks(name: str) -> None:
    before = program(name)
    views = Views(before)
    plan = InsertExit(layers=1, recipe=None).plan(Context(views, tuple(range(len(views.blocks)))))
    after = apply_edits(before, views, plan.edits, "insert_exit")
    ids = tokens(2, 7, seed=1)
    logits, early = after.module(torch.float64)(input_ids=ids)
    assert torch.equal(logits, before.module(torch.float64)(input_ids=ids)[0])
    assert early.shape == logits.shape
    drafted = speculator(
        after,
        Drafting.model_validate({"drafter": {"kind": "exit", "stop": 0.0}, "rows": (5,), "adapt": False}),
        dtype=torch.float64,
    )
    wanted, _ = Speculator(drafted.decoder).generate(PROMPT, 20)
    got, log = drafted.generate(PROMPT, 20)
    assert got.tolist() == wanted.tolist()
    assert {event.rows for event in log.steps[:3]} == {5}


class Changing:
    """Budgets that come and go, so that a draft follows steps without one."""

    most = 5

    def __init__(self) -> None:
        self.turn = 0

    def pause(self) -> int:
        """Three plain steps now and then."""
        if self.turn % 8 != 5:
            return 0
        self.turn += 1
        return 3

    def budget(self) -> int:
        self.turn += 1
        return (1, 5, 1, 1, 5, 5, 1, 3)[self.turn % 8]

    def told(self, event: Event, count: int = 1) -> None:
        """Nothing is learnt."""


def test_an_exit_reads_what_it_missed_and_steps_without_a_draft_do_not_run_it() -> None:
    before = program("llama")
    views = Views(before)
    plan = InsertExit(layers=1, recipe=None).plan(Context(views, tuple(range(len(views.blocks)))))
    after = apply_edits(before, views, plan.edits, "insert_exit")
    drafting = Drafting.model_validate({"drafter": {"kind": "exit", "stop": 0.0, "length": 4}, "rows": (5,)})
    drafted = speculator(after, drafting, dtype=torch.float64)
    assert drafted.decoder.program.entry.outputs == before.entry.outputs
    plain = [spec.name for spec in insert_cache(before).entry.inputs if spec.role == "cache"]
    assert len([s for s in drafted.decoder.program.entry.inputs if s.role == "cache"]) == len(plain)
    drafter, drafts = drafted.drafter, list[Tree]()
    assert isinstance(drafter, Chain)
    # The exit's own attention and that of the one block before it.
    assert len([s for s in drafter.decoder.program.entry.inputs if s.role == "cache"]) == 2 * 2
    propose = drafter.propose

    def checked(root: int, budget: int) -> Tree:
        tree = propose(root, budget)
        fresh = drafter.decoder.cache(1, 64)
        text = [*drafter._text, *tree.token[:-1]]
        drafter.decoder.step(fresh, torch.tensor([text]))
        for key, buffer in fresh.buffers.items():
            mine = drafter._cache.buffers[key]  # type: ignore[union-attr]
            torch.testing.assert_close(mine[:, :, : len(text)], buffer[:, :, : len(text)], rtol=1e-9, atol=1e-9)
        drafts.append(tree)
        return tree

    drafter.propose = checked  # type: ignore[method-assign]
    drafted.controller = Changing()
    wanted, _ = Speculator(decoder("llama")).generate(PROMPT, 40)
    got, _ = drafted.generate(PROMPT, 40)
    assert got.tolist() == wanted.tolist()
    assert len(drafts) > 10


@pytest.mark.parametrize(
    ("drafter", "reason"),
    [
        ({"kind": "heads"}, "insert_heads adds it"),
        ({"kind": "exit"}, "insert_exit adds it"),
        ({"kind": "skip", "skip": 0.01}, "is none"),
    ],
)
def test_a_drafter_that_the_program_cannot_serve_is_declined(drafter: dict[str, object], reason: str) -> None:
    views = Views(program("llama"))
    plan = Speculate.model_validate({"drafter": drafter}).plan(Context(views, tuple(range(len(views.blocks)))))
    assert not plan.edits
    assert reason in plan.declines[0].reason


def test_how_a_program_decodes_comes_from_its_trail() -> None:
    drafting = Drafting.model_validate({"drafter": {"kind": "copy", "fallback": {"kind": "recycle"}}, "rows": (3, 5)})
    edit = Speculation(drafting).to_json()
    applied = Applied("s", {}, "exact", (edit,), (), {}, {}, {})
    assert drafting_of(replace(program("llama"), trail=(applied,))) == drafting
    assert drafting_of(program("llama")) is None


def test_heads_without_weight_are_refused_where_they_are_written() -> None:
    # Found by fuzzing: the weight 0 was taken, and planning failed.
    for kind in (InsertHeads, InsertExit):
        with pytest.raises(ValidationError, match="greater than 0"):
            kind.model_validate({"loss": {"weight": 0.0}})
