"""Which neurons go to which expert."""

from __future__ import annotations

from itertools import pairwise

import torch

from graphopt.observe import Activity, Grouped

Groups = tuple[tuple[int, ...], ...]
ROUNDS = 30


def in_order(neurons: list[int], experts: int) -> Groups:
    """Neighbours together; the first groups hold one neuron more where the number does not divide."""
    width, rest = divmod(len(neurons), experts)
    starts = [expert * width + min(expert, rest) for expert in range(experts + 1)]
    return tuple(tuple(neurons[a:b]) for a, b in pairwise(starts))


def alike(found: Activity, centred: bool) -> torch.Tensor:
    """How much neurons are active together `[I, I]`: the cosine of their absolute values over tokens, or correlation."""
    together = found.together / max(found.count, 1)
    if centred:
        together = together - torch.outer(found.mean, found.mean)
    norm = together.diagonal().clamp_min(torch.finfo(together.dtype).tiny).sqrt()
    return together / torch.outer(norm, norm)


def clustered(similar: torch.Tensor, neurons: list[int], experts: int, seed: int) -> Groups:
    """Groups of equal size that are alike: k-means in the space whose products are `similar`, with full clusters closed.

    The distance of a neuron to a cluster is that to its mean, which the products alone say. The best of all rounds is kept;
    neurons keep their order inside a group.
    """
    products = similar[neurons][:, neurons]
    count = len(neurons)
    sizes = [len(group) for group in in_order(neurons, experts)]
    generator = torch.Generator().manual_seed(seed)
    place = _seeded(products, sizes, generator)
    best, best_inside = place, -float("inf")
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(place, experts).to(products.dtype)
        each = products @ member / member.sum(0)
        inside = float((each * member).sum())
        if inside > best_inside + 1e-12 * abs(inside):
            best, best_inside = place, inside
        own = ((member.T @ products @ member).diagonal()) / member.sum(0) ** 2
        moved = _fill(2 * each - own, sizes)
        if torch.equal(moved, place):
            break
        place = moved
    groups = [[neurons[i] for i in range(count) if int(best[i]) == expert] for expert in range(experts)]
    return tuple(tuple(group) for group in sorted(groups, key=lambda group: (-len(group), group[0])))


def _seeded(products: torch.Tensor, sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """A first assignment around neurons that are far from one another, the first of them drawn."""
    first = int(torch.randint(len(products), (), generator=generator))
    centres = [first]
    nearest = products[first].clone()
    while len(centres) < len(sizes):
        nearest[centres] = float("inf")
        centres.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, products[centres[-1]])
    return _fill(products[:, centres], sizes)


def _fill(near: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Assign each row to the nearest cluster that has room, the most decided pairs first."""
    place = torch.full((len(near),), -1, dtype=torch.int64)
    room = list(sizes)
    for pair in torch.argsort(near.reshape(-1), descending=True, stable=True).tolist():
        row, cluster = divmod(pair, len(sizes))
        if room[cluster] and place[row] < 0:
            place[row] = cluster
            room[cluster] -= 1
    return place


def domains(found: Grouped, experts: int) -> torch.Tensor:
    """Mean absolute activity `[K, I]` in each of K equal runs of samples."""
    samples = len(found.counts)
    bounds = [samples * k // experts for k in range(experts + 1)]
    means = [found.sums[a:b].sum(0) / found.counts[a:b].sum().clamp_min(1) for a, b in pairwise(bounds)]
    return torch.stack(means)


def masked(activity: torch.Tensor, kept: int) -> tuple[tuple[int, ...], Groups]:
    """The neurons that every domain keeps, and for each domain `[K, I]` those of its `kept` most active that not all do."""
    chosen = [set(torch.argsort(row, descending=True, stable=True)[:kept].tolist()) for row in activity]
    shared = set.intersection(*chosen)
    return tuple(sorted(shared)), tuple(tuple(sorted(one - shared)) for one in chosen)
