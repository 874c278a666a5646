"""Bounded caches: the ragged cache equals the mask at every step, its bytes the formula, and policies keep their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.compiler.verify import tolerance, verify
from graphopt.cost import cost
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ops import attention, bounded_attention
from graphopt.ops.bounded import capacity, drop, held_places
from graphopt.passes.cache.bound_cache import BoundCache
from graphopt.passes.cache.insert_cache import InsertCache
from graphopt.passes.cache.learn_gates import LearnGates
from graphopt.passkit import Context, Pass, Plan
from graphopt.passkit.edits import apply_edits
from graphopt.passkit.facts import Effect
from graphopt.runtime import generate
from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.views import Views
from tests.tiny import program

POLICIES: dict[str, dict[str, Any]] = {
    "sink+recent": {"sink": 2, "recent": 6},
    "renumbered": {"sink": 2, "recent": 6, "positions": "renumber"},
    "recent": {"sink": 0, "recent": 1},
    "compensated": {"sink": 1, "recent": 5, "compensate": True},
    "heavy": {"sink": 1, "recent": 3, "heavy": 4},
    "heavy, no sinks": {"sink": 0, "recent": 2, "heavy": 5},
    "some heads": {"sink": 1, "recent": 5, "protect": {"kind": "heads", "heads": {0: (1,), 2: (0, 1)}}},
    "some, compensated": {
        "sink": 1,
        "recent": 5,
        "compensate": True,
        "protect": {"kind": "heads", "heads": {1: (0,)}},
    },
    "some, heavy": {"sink": 1, "recent": 3, "heavy": 4, "protect": {"kind": "heads", "heads": {1: (0,)}}},
}
WINDOWS = ("mistral", "gemma2")
PROMPTS = ((1, 1), (3, 8), (23, 5))
VOCABULARY = 96


def change(before: Program, config: Pass) -> tuple[Program, Plan]:
    """A program after one pass, and the plan."""
    views = Views(before)
    plan = config.plan(Context(views, tuple(range(len(views.blocks)))))
    return (apply_edits(before, views, plan.edits, config.name) if plan.edits else before), plan


def bounded(name: str, **options: Any) -> tuple[Program, Program]:
    """A tiny model under a policy: the mask, and the ragged cache."""
    mask, plan = change(program(name), BoundCache.model_validate(options))
    assert plan.edits
    return mask, change(mask, InsertCache())[0]


def pair(policy: str) -> tuple[Program, Program]:
    """The mask and the ragged cache of a policy, or of the windows that a model has of its own."""
    if policy in WINDOWS:
        return program(policy), change(program(policy), InsertCache(windows="ring"))[0]
    return bounded("llama", **POLICIES[policy])


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to float64's rounding of sums as long as the model is wide."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert error <= tolerance(torch.float64, 128 * 3), error


@pytest.mark.parametrize("policy", [*POLICIES, *WINDOWS])
def test_a_ragged_cache_equals_the_mask_at_every_step(policy: str) -> None:
    mask, ragged = pair(policy)
    whole, decoder = mask.module(torch.float64), Decoder(ragged, torch.float64)
    for lengths in PROMPTS:
        text = torch.randint(0, VOCABULARY, (2, max(lengths) + 14), generator=torch.Generator().manual_seed(1))
        cache = decoder.cache(2, text.shape[1])
        with torch.no_grad():
            wanted = [whole(input_ids=text[row : row + 1])[0][0] for row in range(2)]
        got = decoder.step(cache, text[:, : max(lengths)])[0]
        for row, length in enumerate(lengths):
            close(got[row, :length], wanted[row][:length])
        cache.commit(torch.tensor(lengths))
        for piece in (1, 1, 4, 1, 1, 3, 1):
            at = cache.lengths[:, None] + torch.arange(piece)
            got = decoder.step(cache, text.gather(1, at))[0]
            for row, start in enumerate(cache.lengths.tolist()):
                close(got[row], wanted[row][start : start + piece])
            # What is not committed leaves no trace.
            kept = max(1, piece - 1)
            cache.commit(kept)


@pytest.mark.parametrize("policy", ["sink+recent", "renumbered", "compensated", "some heads", *WINDOWS])
def test_the_accepted_path_of_a_token_tree_is_taken_in(policy: str) -> None:
    mask, ragged = pair(policy)
    whole, decoder = mask.module(torch.float64), Decoder(ragged, torch.float64)
    text = torch.randint(0, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(2))
    nodes = torch.randint(0, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(3))
    cache = decoder.cache(1, 32)
    decoder.step(cache, text)
    cache.commit(11)
    tree = decoder.step(cache, nodes, parents=[(-1, 0, 0, 1, 2)])[0]
    path = [0, 2, 4]
    joined = torch.cat([text, nodes[:, path], text[:, :1]], 1)
    wanted = whole(input_ids=joined)[0][0]
    close(tree[0, path], wanted[11:14])
    cache.commit(torch.tensor([path]))
    close(decoder.step(cache, text[:, :1])[0][0], wanted[14:])


def test_a_ring_has_the_bytes_of_the_windows_whatever_the_length() -> None:
    # Three layers of two KV heads of 8; all of mistral's and the first and last of gemma2's have a window of 8.
    for name, windows in (("mistral", 3), ("gemma2", 2)):
        mask, ragged = pair(name)
        for length in (16, 40):
            formula = 4 * 3 * 2 * 2 * 8 * (windows * 8 + (3 - windows) * length)
            assert Cache(ragged, 3, length, torch.float32).bytes() == formula
            assert cost(ragged).at(B=3, S=1, C=length)["kv_bytes"] == formula
        assert Cache(change(mask, InsertCache())[0], 3, 40, torch.float32).bytes() == 4 * 3 * 2 * 2 * 8 * 3 * 40


def test_generation_with_unequal_prompts_equals_the_mask() -> None:
    mask, ragged = bounded("llama", sink=1, recent=3, heavy=4)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(4))
    padding = torch.ones_like(ids)
    padding[1, :5] = 0
    ids = ids * padding
    assert torch.equal(
        generate(ragged, ids, padding=padding, max_new_tokens=9), generate(mask, ids, padding=padding, max_new_tokens=9)
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_of_the_formula(policy: str) -> None:
    mask, ragged = bounded("llama", **POLICIES[policy])
    options = BoundCache.model_validate(POLICIES[policy])
    cache = Cache(ragged, 3, 40, torch.float32)
    plain = {name: b for name, b in cache.buffers.items() if not name.endswith(("_places", "_mass"))}
    layers, kv_heads, size = 3, 2, 8
    whole = sum(map(len, POLICIES[policy].get("protect", {"heads": {}})["heads"].values()))
    entries = options.sink + options.recent + options.heavy + options.compensate
    elements = 2 * size * (whole * 40 + (layers * kv_heads - whole) * entries)
    assert sum(b.numel() * b.element_size() for b in plain.values()) == 3 * 4 * elements
    assert cost(mask).at(B=3, S=40)["kv_bytes"] == cost(ragged).at(B=3, S=1, C=40)["kv_bytes"] == 3 * 4 * elements


@pytest.mark.parametrize("policy", ["sink+recent", "renumbered", "compensated", "heavy"])
def test_a_budget_that_holds_the_text_changes_nothing(policy: str) -> None:
    options = {**POLICIES[policy], "recent": 30}
    mask, _ = bounded("qwen3", **options)
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(5))
    close(mask.module(torch.float64)(input_ids=ids)[0], program("qwen3").module(torch.float64)(input_ids=ids)[0])


def test_renumbered_tokens_stand_inside_the_cache() -> None:
    # With one layer a token sees sinks and recents alone, so that the text may be cut to them.
    from graphopt.frontend import capture_model
    from tests.tiny import make_model

    one = capture_model(make_model("llama", num_hidden_layers=1))
    renumbered, _ = change(one, BoundCache(sink=2, recent=5, positions="renumber"))
    kept, _ = change(one, BoundCache(sink=2, recent=5))
    ids = torch.randint(0, VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(6))
    short = torch.cat([ids[:, :2], ids[:, -5:]], 1)
    wanted = one.module(torch.float64)(input_ids=short)[0][0, -1]
    close(renumbered.module(torch.float64)(input_ids=ids)[0][0, -1], wanted)
    with pytest.raises(AssertionError):
        close(kept.module(torch.float64)(input_ids=ids)[0][0, -1], wanted)


def _random(heads: int, count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(2, heads, count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _attend(policy: tuple[int, int, int, bool], *given: torch.Tensor, heads: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    found: torch.Tensor = bounded_attention(*given, None, None, 0.3, True, None, None, None, None, list(heads), *policy)
    return found


def test_compensation_is_exact_for_equal_keys_and_never_attends_too_much() -> None:
    q, k, v = _random(4, 20, 8, 0), _random(2, 20, 8, 1), _random(2, 20, 8, 2)
    same = k.clone()
    same[:, :, 1:16] = k[:, :, 1:2]
    whole = attention(q, same, v, None, None, 0.3, True, None, None)
    close(_attend((1, 4, 0, True), q, same, v)[:, :, -1], whole[:, :, -1])
    # Values of one on what is gone and zero elsewhere show the mass: Jensen bounds it from above.
    marked = torch.zeros_like(v)
    marked[:, :, 1:16] = 1
    held = _attend((1, 4, 0, True), q, k, marked)[:, :, -1]
    assert bool((held <= attention(q, k, marked, None, None, 0.3, True, None, None)[:, :, -1] + 1e-12).all())
    assert float(held.min()) > 0


def test_heavy_hitters_keep_their_number_the_last_ones_and_never_return() -> None:
    q, k = _random(4, 30, 8, 3), _random(2, 30, 8, 4)
    sink, recent, heavy = 1, 3, 4
    # Values that name their token show what each token sees.
    names = torch.eye(30, dtype=torch.float64).expand(2, 2, -1, -1)
    seen = (_attend((sink, recent, heavy, False), q, k, names) > 0).reshape(2, 2, 2, 30, 30)
    assert torch.equal(seen[:, :, 0], seen[:, :, 1]), "query heads of a group see the same"
    visible = seen[:, :, 0]
    for i in range(30):
        now = visible[:, :, i]
        assert bool((now.sum(-1) == min(i + 1, capacity(sink, recent, heavy) + 1)).all())
        assert bool(now[..., max(0, i - recent + 1) : i + 1].all())
        assert bool(now[..., 0].all())
        if i:
            assert not bool((now & ~visible[:, :, i - 1])[..., :i].any()), "what has gone does not return"
    assert not torch.equal(visible[0], visible[1]), "rows decide for themselves"
    later = _attend((sink, recent, heavy, False), q, k, names)[:, :, :20]
    short = _attend((sink, recent, heavy, False), q[:, :, :20], k[:, :, :20], names[:, :, :20])
    close(later, short)


def test_the_least_goes_and_of_equals_the_earlier() -> None:
    places = torch.arange(6)[None, None]
    alive = torch.ones(1, 1, 6, dtype=torch.bool)
    mass = torch.tensor([[[0.0, 3.0, 1.0, 1.0, 0.0, 0.0]]])
    left = drop(mass, alive, places, torch.tensor([[[5]]]), 1, 2, 5)
    assert left.tolist() == [[[True, True, False, True, True, True]]]
    assert torch.equal(drop(mass, alive, places, torch.tensor([[[5]]]), 1, 2, 6), alive)


def test_the_ring_holds_the_first_and_the_last() -> None:
    for length in range(14):
        found = {place for place in held_places(torch.tensor([length]), 2, 4)[0].tolist() if place >= 0}
        assert found == {p for p in range(length) if p < 2 or p >= length - 4}


def _hand_made(induction: bool) -> Program:
    """A model whose second KV head of two sends each token to the token behind its last copy, when asked."""
    from graphopt.frontend import capture_module
    from graphopt.ir.program import Input

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.eye(32))
            self.mix = torch.nn.Linear(32, 32, bias=False)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids)
            before = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
            key = before if induction else torch.zeros_like(x)
            q = torch.stack([torch.zeros_like(x), 300 * x], 1)
            k = torch.stack([torch.zeros_like(x), key], 1)
            v = torch.stack([x, x], 1)
            return self.mix(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum(1))

    return capture_module(Model(), (Input("input_ids", ("B", "S"), torch.int64, "tokens"),))


def test_a_hand_made_induction_head_scores_near_one() -> None:
    from graphopt.passes.cache.protect import best, probe
    from graphopt.spec import Percent

    made = _hand_made(induction=True)
    scores = probe(made, Views(made).attentions, 16, 4, 0)
    (first, second), (echo, _) = (
        scores["induction"][next(iter(scores["induction"]))],
        next(iter(scores["echo"].values())),
    )
    assert second > 0.9 > 0.3 > first
    assert best(scores, {"induction": Percent.parse("50%"), "echo": Percent.parse("0%")}) == {
        Views(made).attentions[0].path: {1}
    }
    assert 0 <= echo < 0.3
    with pytest.raises(PlanError, match="do not fit"):
        probe(program("gpt2"), Views(program("gpt2")).attentions, 64, 4, 0)


def test_gates_mix_and_decide() -> None:
    before = program("llama")
    gated, plan = change(before, LearnGates(sink=1, recent=4, recipe=None))
    assert verify(before, gated, plan, Effect.UNTRAINED, "full", None, "gates")["largest_relative_error"] == 0
    ids = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(7))
    plain = gated.module(torch.float32)(input_ids=ids)[0]
    assert torch.equal(plain, before.module(torch.float32)(input_ids=ids)[0]), "gates of 1 change no bit"
    from graphopt.ir.weights import Const

    names = [name for name in gated.weights if name.endswith(".gates")]
    weights = gated.weights
    for i, name in enumerate(names):
        weights = weights.with_expr(name, lambda _, i=i: Const(torch.tensor([0.9, 0.1 * i]), torch.float32))
    from dataclasses import replace

    learnt = replace(gated, weights=weights)
    decided, plan = change(learnt, BoundCache.model_validate({"sink": 1, "recent": 4, "protect": {"kind": "gates"}}))
    assert [edit.to_json()["heads"] for edit in plan.edits] == [[1], [1], [1]]
    assert not [name for name in decided.weights if name.endswith(".gates")]
    named, _ = bounded("llama", sink=1, recent=4, protect={"kind": "heads", "heads": {0: (0,), 1: (0,), 2: (0,)}})
    close(decided.module(torch.float64)(input_ids=ids)[0], named.module(torch.float64)(input_ids=ids)[0])
    undecided = change(learnt, InsertCache())[1]
    assert not undecided.edits
    assert "nothing is decided" in undecided.declines[0].reason


def test_what_cannot_be_bounded_is_declined_in_words() -> None:
    def reasons(name: str, **options: Any) -> str:
        return " ".join(d.reason for d in change(program(name), BoundCache.model_validate(options))[1].declines)

    assert "window of 8" in reasons("mistral", recent=4)
    assert "cannot be told from its mask" in reasons("bloom", recent=4)
    assert "not rotated" in reasons("gpt2", recent=4, positions="renumber")
    mask, _ = bounded("llama", recent=4)
    assert "bounded already" in change(mask, BoundCache(recent=4))[1].declines[0].reason
    for options in ({"heavy": 2, "compensate": True}, {"heavy": 2, "positions": "renumber"}):
        with pytest.raises(ValueError, match=r"heavy and compensate|cannot be renumbered"):
            BoundCache.model_validate(options)
    with pytest.raises(PlanError, match="no learnt gates"):
        change(program("llama"), BoundCache.model_validate({"protect": {"kind": "gates"}}))
    with pytest.raises(PlanError, match="no head 7"):
        change(program("llama"), BoundCache.model_validate({"protect": {"kind": "heads", "heads": {0: (7,)}}}))


def test_what_has_gone_cannot_come_back() -> None:
    _, ragged = bounded("llama", sink=1, recent=3, heavy=4)
    decoder = Decoder(ragged, torch.float64)
    cache = decoder.cache(1, 32)
    first = decoder.step(cache, torch.arange(9)[None])[0]
    cache.commit(9)
    with pytest.raises(ValueError, match="no step"):
        cache.commit(1)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.truncate(4)
    with pytest.raises(ValueError, match="order of the text"):
        decoder.step(cache, torch.arange(3)[None], parents=[(-1, -1, -1)])
    cache.truncate(0)
    close(decoder.step(cache, torch.arange(9)[None])[0], first)
