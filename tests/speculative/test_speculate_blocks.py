"""Shared blocks of speculation: trees, builders, acceptance laws, controllers and the log."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ops.trees import is_straight, sees, walk
from graphopt.runtime.speculate import (
    Event,
    Exact,
    Goodput,
    Greedy,
    Log,
    Template,
    Tree,
    Typical,
    best_first,
    from_template,
    widths,
)
from graphopt.runtime.speculate.accept import sampling_law
from graphopt.runtime.speculate.build import best_paths

V = 5


@st.composite
def trees(draw: st.DrawFn, most: int = 24) -> Tree:
    """Random trees over a vocabulary of `V`."""
    token, parent, taken = [draw(st.integers(0, V - 1))], [-1], set()
    for node in range(1, draw(st.integers(1, most))):
        above, word = draw(st.integers(0, node - 1)), draw(st.integers(0, V - 1))
        if (above, word) not in taken and above < len(token):
            taken.add((above, word))
            token.append(word)
            parent.append(above)
    return Tree(tuple(token), tuple(parent))


@given(trees())
def test_masks_depths_and_paths_follow_from_parents(tree: Tree) -> None:
    spans, depth = walk((tree.parent,))
    seen = sees(spans)
    assert tuple(depth[0].tolist()) == tree.depth
    assert is_straight(spans) == tree.is_chain
    for node in range(len(tree)):
        path = tree.path(node)
        assert path[0] == 0
        assert path[-1] == node
        assert tree.depth[node] == len(path) - 1
        assert set(torch.nonzero(seen[0, node]).flatten().tolist()) == set(path)
    assert sum(map(len, tree.children)) == len(tree) - 1
    assert Tree.chain(1, (2, 2)).is_chain


@pytest.mark.parametrize(
    ("token", "parent"), [((1, 2), (-1, 1)), ((1, 2, 2), (-1, 0, 0)), ((1,), (0,)), ((), ()), ((1, 2), (-1, -1))]
)
def test_what_is_no_tree_is_refused(token: tuple[int, ...], parent: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tree|parents|children"):
        Tree(token, parent)


def test_templates_are_prefix_closed_and_give_trees() -> None:
    template = widths((3, 1))
    tree = from_template(template, 9, [[4, 5, 6], [7]])
    assert tree.token == (9, 4, 5, 6, 7, 7, 7)
    assert tree.parent == (-1, 0, 0, 0, 1, 2, 3)
    assert len(from_template(template.cut(5), 9, [[4, 5, 6], [7]])) == 5
    for paths in (((0, 1),), ((0,), (0,))):
        with pytest.raises(ValueError, match="template"):
            Template(paths)


@given(st.integers(0, 30), st.integers(0, 1000))
def test_best_first_takes_the_likeliest_paths(budget: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 4, generator=generator).softmax(-1).log().sort(-1, descending=True).values
    tree = best_first(9, [[0, 1, 2, 3]] * 3, scores.tolist(), budget)
    assert len(tree) == min(max(budget, 1), 1 + 4 + 16 + 64)
    everything = [(a,) for a in range(4)] + [(a, b) for a in range(4) for b in range(4)]
    everything += [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    best = sorted((sum(float(scores[i, r]) for i, r in enumerate(p)) for p in everything), reverse=True)
    got = sorted(
        (
            sum(float(scores[i, tree.token[n]]) for i, n in enumerate(tree.path(node)[1:]))
            for node in range(1, len(tree))
        ),
        reverse=True,
    )
    assert got == pytest.approx(best[: len(got)], abs=1e-5)
    template = best_paths(scores.exp(), len(tree) - 1)
    assert {tuple(tree.token[n] for n in tree.path(node)[1:]) for node in range(1, len(tree))} == set(template.paths)


@given(trees(), st.integers(0, 1000))
def test_greedy_keeps_the_longest_path_of_likeliest_tokens(tree: Tree, seed: int) -> None:
    logits = torch.randn(len(tree), V, generator=torch.Generator().manual_seed(seed))
    path, token = Greedy()(tree, logits)
    best = logits.argmax(-1).tolist()
    right = [n for n in range(len(tree)) if all(tree.token[b] == best[a] for a, b in _edges(tree, n))]
    assert tree.depth[path[-1]] == max(tree.depth[n] for n in right)
    assert path[-1] in right
    assert token == best[path[-1]]


def _edges(tree: Tree, node: int) -> list[tuple[int, int]]:
    path = tree.path(node)
    return list(itertools.pairwise(path))


def _table(seed: int) -> torch.Tensor:
    """Probabilities of the next token given the last two, `[V, V, V]`."""
    return (2 * torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)


def _draft(kind: str, draft: torch.Tensor, root: int, generator: torch.Generator) -> Tree:
    """A tree of two levels behind a root, drawn from (or ranked by) a draft model `[V, V]` of the last token."""
    token, parent, q = [root], [-1], [draft[root]]
    for above in (0, 1):
        law, count = draft[token[above]], {"chain": 1}.get(kind, 2)
        if kind == "one_hot":
            words = law.topk(count).indices.tolist()
        else:
            words = torch.multinomial(law, count, replacement=False, generator=generator).tolist()
        for word in words:
            token.append(word)
            parent.append(above)
            q.append(draft[word])
    return Tree(tuple(token), tuple(parent), None if kind == "one_hot" else torch.stack(q))


@pytest.mark.parametrize("kind", ["chain", "without_replacement", "one_hot"])
def test_exact_acceptance_keeps_the_law_of_plain_sampling(kind: str) -> None:
    table, draft = _table(1), _table(2)[0]
    runs, generator = 12_000, torch.Generator().manual_seed(7)
    accept = Exact(lambda logits: logits.exp(), generator)
    counts = torch.zeros(V, V)
    for _ in range(runs):
        tree = _draft(kind, draft, 0, generator)
        # The program's own law at each node: of the token there and the one before it.
        rows = torch.stack([table[tree.token[max(p, 0)], tree.token[n]] for n, p in enumerate(tree.parent)])
        path, token = accept(tree, rows.log())
        new = [*(tree.token[n] for n in path[1:]), token]
        if len(new) == 1:
            new.append(int(torch.multinomial(table[0, new[0]], 1, generator=generator)))
        counts[new[0], new[1]] += 1
    law = table[0, 0][:, None] * table[0]
    statistic = float(((counts - runs * law).square() / (runs * law)).sum())
    # 99.9% quantile of chi-square with 24 degrees of freedom.
    assert statistic < 51.2


def test_typical_acceptance_is_declared_lossy_and_its_ends_are_nothing_and_everything() -> None:
    law, generator = sampling_law(1.0), torch.Generator().manual_seed(0)
    logits = torch.randn(7, V, generator=generator)
    tree = Tree((0, 1, 2, 3, 4, 1, 2), (-1, 0, 0, 1, 3, 2, 4))
    nothing = Typical(law, generator, eps=1.0, delta=math.inf)(tree, logits)
    everything = Typical(law, generator, eps=0.0)(tree, logits)
    assert nothing[0] == (0,)
    assert everything[0] == tree.path(6)
    assert not Typical.lossless
    assert Greedy.lossless
    assert Exact.lossless


@given(st.floats(0.2, 3), st.integers(1, V), st.floats(0.1, 1), st.integers(0, 100))
def test_sampling_law_is_that_of_plain_sampling(heat: float, top_k: int, top_p: float, seed: int) -> None:
    from graphopt.runtime.generate import choose

    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(seed))
    law = sampling_law(heat, top_k, top_p)(logits)[0]
    assert float(law.sum()) == pytest.approx(1)
    assert 1 <= int((law > 0).sum()) <= top_k
    drawn = {int(choose(logits, torch.Generator().manual_seed(i), heat, top_k, top_p)) for i in range(20)}
    assert all(law[token] > 0 for token in drawn)


def test_figures_derive_from_events() -> None:
    log = Log([Event(9, 1, 0, 0.5), Event(4, 3, 2, 0.2), Event(1, 1, 0, 0.1)])
    assert log.emitted == 5 == len(log.steps) + 2 + 1
    assert log.tau == 2
    assert log.acceptance_rate == pytest.approx(2 / 3)
    assert log.ttft == 0.5
    assert log.tpot == pytest.approx(0.075)


def steps(control: Goodput, count: int, emitted: dict[int, int], seconds: dict[int, float]) -> tuple[list[int], float]:
    """Budgets of so many steps, of which a plain one takes a second, and the seconds lost to plain decoding."""
    used = []
    while len(used) < count:
        plain = min(control.pause(), count - len(used), 5)
        used += [1] * plain if plain else [control.budget()]
        control.told(Event(used[-1], emitted.get(used[-1], 1), 0, seconds.get(used[-1], 1.0)), max(plain, 1))
    return used, sum(seconds.get(rows, 1.0) - emitted.get(rows, 1) for rows in used)


def test_goodput_takes_what_pays() -> None:
    for emitted, seconds, best in ((3, 2.0, 8), (1, 1.1, 1), (2, 1.9, 8), (2, 2.1, 1)):
        control = Goodput((8,))
        used, lost = steps(control, 400, {8: emitted}, {8: seconds})
        assert control.best() == best
        total = {8: used.count(8) * seconds, 1: used.count(1)}
        if best == 8:
            lost = total[1] - used.count(1) * seconds / emitted
        # The first two steps are plain, whatever pays.
        assert lost <= 4 + 0.005 * sum(total.values())


@given(st.lists(st.integers(2, 64), min_size=1, max_size=4), st.floats(0.05, 1), st.integers(20, 800))
def test_goodput_loses_no_more_than_its_share_where_speculation_does_not_pay(
    budgets: list[int], row: float, count: int
) -> None:
    cost = {budget: 1 + row * (budget - 1) for budget in budgets}
    used, lost = steps(Goodput(tuple(budgets)), count, {}, cost)
    # Nothing is known before two steps of a budget.
    first = next((rows for rows in used if rows > 1), 1)
    assert lost <= max(2, 2 * row * (first - 1)) + 0.005 * sum(cost.get(rows, 1) for rows in used) + 1e-6


def test_goodput_finds_out_when_speculation_begins_to_pay_and_stops_when_it_no_longer_does() -> None:
    control = Goodput((4, 8))
    cost = {4: 1.5, 8: 2.0}
    _, lost = steps(control, 1000, {}, cost)
    assert lost <= 2 + 0.005 * 1000
    assert control.best() == 1
    used, _ = steps(control, 1000, {4: 2, 8: 4}, cost)
    assert used[500:].count(8) > 480
    used, lost = steps(control, 200, {}, cost)
    assert used[50:].count(1) > 140


def test_goodput_spends_what_drafts_save_on_finding_a_better_number_of_rows() -> None:
    control = Goodput((4, 8))
    cost = {4: 2.0, 8: 2.5}
    # Eight rows begin badly, and are the best ever after.
    used, _ = steps(control, 400, {4: 4, 8: 1}, cost)
    assert control.best() == 4
    assert 3 < used.count(8) < 20
    used, _ = steps(control, 400, {4: 4, 8: 8}, cost)
    assert used[200:].count(8) > 190
    # What is worse is tried less and less.
    used, _ = steps(control, 2000, {4: 4, 8: 8}, cost)
    assert used[1000:].count(4) < 10


def test_goodput_lets_no_cheap_trials_keep_dear_ones_from_their_turn() -> None:
    control = Goodput((4, 8))
    steps(control, 1000, {4: 1, 8: 8}, {4: 1.5, 8: 3.0})
    assert control.best() == 8
    # Plain steps, too, are tried again while drafts pay, and found to have become faster.
    steps(control, 20000, {4: 1, 8: 8}, {1: 0.2, 4: 1.5, 8: 3.0})
    assert control.best() == 1


def test_goodput_tries_a_drafter_that_takes_twice_what_it_gives_only_once() -> None:
    control, tried = Goodput((4, 8)), 0
    for _ in range(300):
        plain = control.pause()
        rows = 1 if plain else control.budget()
        tried += rows > 1
        control.told(Event(1, 1, 0, 1.0) if rows == 1 else Event(rows, 2, 1, 9.0, 6.0), min(plain, 3) or 1)
    assert tried == 1


def test_goodput_tries_hopeless_budgets_ever_less_often_and_doubtful_ones_as_before() -> None:
    tried = {}
    for seconds in (1.9, 6.0):
        used, _ = steps(Goodput((4,)), 20000, {}, {4: seconds})
        doubtful, _ = steps(Goodput((64,)), 20000, {}, {64: seconds})
        tried[seconds] = used.count(4), doubtful.count(64)
    # A step of 64 rows may give so much that a few that gave nothing prove little; in the end they do.
    assert tried[1.9][0] < tried[1.9][1] < 20000 * 0.005 / 0.9 + 4
    assert tried[6.0][0] < 20000 * 0.005 / 5 / 2


def test_goodput_judges_a_drafter_that_seldom_drafts_by_its_drafts() -> None:
    control, used = Goodput((4,)), list[int]()
    for step in range(400):
        plain = control.pause()
        rows = 1 if plain or step % 5 else control.budget()
        if not plain and step % 5:
            control.budget()
        used.append(0 if plain else 4)
        control.told(Event(1, 1, 0, 1.0, 0.01) if rows == 1 else Event(4, 3, 2, 2.0, 0.01))
    assert control.best() == 4
    assert all(used[50:])


def test_goodput_takes_an_interruption_for_none_of_the_budget_s_doing() -> None:
    control = Goodput((8,))
    for step in range(200):
        rows = 1 if control.pause() else control.budget()
        seconds = 1.0 if rows == 1 else 2.0
        control.told(Event(rows, 1 if rows == 1 else 3, 0, seconds * (30 if step in (1, 2, 50) else 1)))
    assert control.best() == 8
