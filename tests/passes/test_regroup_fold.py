"""The fold itself: identity for one member, never worse than the mean, commuting with rotation, balanced groups."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.passes.attention.fold import (
    first_fold,
    mean_fold,
    order_groups,
    pair_losses,
    residual,
    similar_groups,
    svd_fold,
)

KINDS = {
    "none": torch.empty(0, 2, dtype=torch.long),
    "half": torch.tensor([[0, 3], [1, 4], [2, 5]]),
    "interleaved": torch.tensor([[0, 1], [2, 3], [4, 5]]),
    "partial": torch.tensor([[0, 2], [1, 3]]),
}


def gram(heads: int, seed: int, rank: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, rank, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(rank, heads * 6, dtype=torch.float64, generator=generator)
    return x.T @ x


def costs(heads: int, seed: int) -> torch.Tensor:
    root = torch.randn(heads, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT + 0.1 * torch.eye(6, dtype=torch.float64)


def traces(cost: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """What the fold minimises: on pairs the mean of the diagonal, on the rest the whole block."""
    free = sorted(set(range(6)) - set(pairs.reshape(-1).tolist()))
    made = torch.zeros_like(cost)
    for a, b in pairs.tolist():
        made[:, a, a] = made[:, b, b] = cost[:, a, a] + cost[:, b, b]
    index = torch.tensor(free, dtype=torch.long)
    made[:, index[:, None], index] = cost[:, index[:, None], index]
    return made


@given(st.sampled_from(sorted(KINDS)), st.sampled_from([8, 4, 2, 1]), st.integers(0, 10**6), st.booleans())
def test_svd_is_never_worse_than_mean(kind: str, count: int, seed: int, weighted: bool) -> None:
    pairs, groups, products = KINDS[kind], order_groups(8, count), gram(8, seed)
    cost = costs(8, seed) if weighted else None
    measured = None if cost is None else traces(cost, pairs)
    fold = svd_fold(products, 6, groups, pairs, cost)
    mean = residual(mean_fold(8, 6, groups), products, groups, measured)
    scale = float(products.trace()) * 1e-9
    assert residual(fold, products, groups, measured) <= mean + scale
    if count == 8:
        assert float((fold.into - torch.eye(6)).abs().max()) < 2e-15 or weighted
        assert float((fold.back @ fold.into - torch.eye(6)).abs().max()) < 1e-9


def test_one_member_is_the_identity() -> None:
    for pairs in KINDS.values():
        fold = svd_fold(gram(4, 0), 6, order_groups(4, 4), pairs)
        assert float((fold.into - torch.eye(6)).abs().max()) < 2e-15
        assert float((fold.back - torch.eye(6)).abs().max()) < 2e-15


@given(st.sampled_from(["half", "interleaved", "partial"]), st.integers(0, 10**6), st.booleans())
def test_key_fold_commutes_with_rotation(kind: str, seed: int, weighted: bool) -> None:
    pairs = KINDS[kind]
    fold = svd_fold(gram(4, seed), 6, order_groups(4, 2), pairs, costs(4, seed) if weighted else None)
    generator = torch.Generator().manual_seed(seed)
    angle = torch.rand(len(pairs), dtype=torch.float64, generator=generator) * 6
    repeat = angle.repeat_interleave(2) if kind == "interleaved" else torch.cat([angle, angle])
    turn = torch.ops.graphopt.rotary.default
    cos, sin = repeat.cos().reshape(1, 1, 1, -1), repeat.sin().reshape(1, 1, 1, -1)
    x = torch.randn(1, 4, 1, 6, dtype=torch.float64, generator=generator)
    for maps in (fold.into.mT, fold.back):
        before = turn(x @ maps, cos, sin, kind == "interleaved")
        after = turn(x, cos, sin, kind == "interleaved") @ maps
        assert torch.allclose(before, after, rtol=0, atol=1e-12 * float(maps.abs().max()))


def test_all_directions_kept_is_exact() -> None:
    """Heads that span no more than one head's features are rebuilt exactly."""
    products = gram(4, 3, rank=6)
    groups = order_groups(4, 1)
    assert residual(svd_fold(products, 6, groups, KINDS["none"]), products, groups) < 1e-9 * float(products.trace())
    assert residual(first_fold(4, 6, groups), products, groups) > 0.1 * float(products.trace())


@given(st.sampled_from(sorted(KINDS)), st.sampled_from([4, 2]), st.integers(0, 10**6))
def test_pair_losses_are_residuals_of_pairs(kind: str, heads: int, seed: int) -> None:
    products, pairs = gram(heads, seed), KINDS[kind]
    for aligned in (True, False):
        losses = pair_losses(products, 6, pairs, None, aligned)
        block = products.reshape(heads, 6, heads, 6)[:2][:, :, :2].reshape(12, 12)
        pair = ((0, 1),)
        fold = svd_fold(block, 6, pair, pairs) if aligned else mean_fold(2, 6, pair)
        expected = residual(fold, block, pair) / float(products.trace())
        assert abs(float(losses[0, 1]) - expected) < 1e-9
        assert torch.equal(losses, losses.T)


@given(st.sampled_from([(8, 4), (8, 2), (6, 3), (6, 2), (9, 3)]), st.integers(0, 10**6))
def test_groups_are_balanced_and_no_dearer_than_neighbours(sizes: tuple[int, int], seed: int) -> None:
    heads, count = sizes
    losses = torch.rand(heads, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    losses = losses + losses.T
    groups = similar_groups(losses, count)
    assert sorted(i for group in groups for i in group) == list(range(heads))
    assert {len(group) for group in groups} == {heads // count}

    def cost(groups: tuple[tuple[int, ...], ...]) -> float:
        return sum(float(losses[i, j]) for group in groups for i in group for j in group if i != j)

    assert cost(groups) <= cost(order_groups(heads, count)) + 1e-9


def test_copies_find_each_other() -> None:
    x = torch.randn(50, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = x[:, [0, 1, 2, 1, 2, 0]].reshape(50, 36)
    losses = pair_losses(mixed.T @ mixed, 6, KINDS["half"], None, True)
    assert similar_groups(losses, 3) == ((0, 5), (1, 3), (2, 4))


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6))
def test_the_size_of_a_cost_moves_nothing_from_keys_into_queries(kind: str, seed: int) -> None:
    """Found by training after the fold: keys 10^4 times as large as queries, which no learning rate fits."""
    products, groups, cost = gram(4, seed), order_groups(4, 2), costs(4, seed)
    small, large = (svd_fold(products, 6, groups, KINDS[kind], cost * size) for size in (1.0, 1e8))
    torch.testing.assert_close(small.into, large.into, rtol=1e-6, atol=1e-6 * float(small.into.abs().max()))
    torch.testing.assert_close(small.back, large.back, rtol=1e-6, atol=1e-6 * float(small.back.abs().max()))
    if kind in ("half", "interleaved"):
        # Equal heads that cost the same are read back as they are.
        alike = gram(1, seed).repeat(4, 4)
        fold = svd_fold(alike, 6, groups, KINDS[kind], cost[:1].repeat(4, 1, 1) * 1e8)
        assert float((fold.back - torch.eye(6)).abs().max()) < 1e-9
