"""The linear algebra of sharing key-value heads: which heads go together, and the map from each into the shared one.

Shapes: K old KV heads in groups of t, D features a head. `into[j]` `[D, D]` is head j's contribution to the shared
head, `back[j]` `[D, D]` rebuilds head j from it: head j is approximated by back[j] sum_i into[i] x_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ir.weights import WeightStore
from graphopt.views import Linear

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Fold:
    """Maps of every old head `[K, D, D]` in float64: `into` the shared head and `back` from it.

    Where all heads have one map it is held once (an expanded tensor), which matters with many layers of many heads.
    """

    into: Tensor
    back: Tensor


def mean_fold(heads: int, width: int, groups: Groups) -> Fold:
    """Average the members of each group (GQA, arXiv 2305.13245)."""
    eye = torch.eye(width, dtype=torch.float64)
    return Fold((eye / len(groups[0])).expand(heads, width, width), eye.expand(heads, width, width))


def first_fold(heads: int, width: int, groups: Groups) -> Fold:
    """Keep the first member of each group."""
    eye = torch.eye(width, dtype=torch.float64)
    into = torch.zeros(heads, width, width, dtype=torch.float64)
    into[[group[0] for group in groups]] = eye
    return Fold(into, eye.expand(heads, width, width))


def of_heads(maps: Tensor, heads: Tensor) -> Tensor:
    """The maps of `heads` `[...]` as `[..., D, D]`; one map of all heads stays one."""
    return maps[0].expand(*heads.shape, *maps.shape[1:]) if maps.stride(0) == 0 else maps[heads]


def svd_fold(gram: Tensor, width: int, groups: Groups, pairs: Tensor, weight: Tensor | None = None) -> Fold:
    """The closest shared head by the Gram matrix `[K D, K D]` of all heads (arXiv 2406.07056).

    Features in `pairs` `[F, 2]` are complex numbers a + ib that rotary embedding turns by one angle in every head; each
    gets one complex weight a head, from the leading eigenvector of its t x t covariance, which commutes with the turn.
    The other features share a real basis, the leading eigenvectors of their joint Gram matrix. `weight` `[K, D, D]`,
    symmetric positive, says how much each head's error costs (identity where absent); on pairs only its trace counts.

    Minimises sum over tokens and heads of the squared error, so it is never worse than `mean_fold` there.
    """
    heads = gram.shape[0] // width
    into = torch.zeros(heads, width, width, dtype=torch.float64)
    back = torch.zeros_like(into)
    table = gram.to(torch.float64).reshape(heads, width, heads, width)
    free = sorted(set(range(width)) - set(pairs.reshape(-1).tolist()))
    for group in groups:
        members = torch.tensor(group)
        block = table[members][:, :, members]
        cost = None if weight is None else weight[members].to(torch.float64)
        for a, b in pairs.tolist():
            _fold_pair(block, cost, members, a, b, into, back)
        if free:
            _fold_free(block, cost, members, torch.tensor(free), into, back)
    return Fold(into, back)


def _fold_pair(block: Tensor, cost: Tensor | None, members: Tensor, a: int, b: int, into: Tensor, back: Tensor) -> None:
    aa, bb, ab = block[:, a, :, a], block[:, b, :, b], block[:, a, :, b]
    covariance = torch.complex(aa + bb, ab.T - ab)
    scale = torch.ones(len(members), dtype=torch.float64)
    if cost is not None:
        scale = _positive(cost[:, a, a] + cost[:, b, b]).sqrt()
        # The cost's own size must not move from keys into queries: training and small formats need both near one.
        scale = scale / scale.log().mean().exp()
        covariance = covariance * (scale[:, None] * scale[None, :])
    lead = _leading(covariance, 1)[:, 0]
    total = (lead / scale).sum()
    if float(total.abs()) > 0:
        lead = lead * (total.conj() / total.abs())
    # Equal heads then give the identity: the mean of the members, read back unchanged.
    level = float(len(members)) ** 0.5
    _place(into, members, a, b, lead.conj() * scale / level)
    _place(back, members, a, b, lead / scale * level)


def _place(maps: Tensor, members: Tensor, a: int, b: int, number: Tensor) -> None:
    """Write multiplication by a complex number into features a and b of each member's map."""
    maps[members, a, a] = number.real
    maps[members, b, b] = number.real
    maps[members, a, b] = -number.imag
    maps[members, b, a] = number.imag


def _fold_free(block: Tensor, cost: Tensor | None, members: Tensor, free: Tensor, into: Tensor, back: Tensor) -> None:
    count, size = len(members), len(free)
    gram = block[:, free][:, :, :, free].reshape(count * size, count * size)
    root = inverse = torch.eye(size, dtype=torch.float64).expand(count, size, size)
    if cost is not None:
        costs = cost[:, free][:, :, free]
        typical = costs.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300)
        root, inverse = _roots(costs / typical)
        whole = torch.block_diag(*root)
        gram = whole @ gram @ whole
    basis = _leading(gram, size).reshape(count, size, size)
    out = inverse @ basis
    # Any rotation of the shared basis is as good; the one nearest to the mean keeps equal heads as they are.
    left, _, right = torch.linalg.svd(out.sum(0))
    turn = right.T @ left.T
    level = float(count) ** 0.5
    into[members[:, None, None], free[:, None], free] = turn.T @ basis.mT @ root / level
    back[members[:, None, None], free[:, None], free] = out @ turn * level


def _leading(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors `[n, count]` of the largest eigenvalues of a Hermitian matrix."""
    hermitian = (matrix + matrix.mH) / 2
    return torch.linalg.eigh(hermitian).eigenvectors[:, -count:]


def _positive(value: Tensor) -> Tensor:
    return value.clamp_min(float(value.max()) * 1e-12).clamp_min(1e-300)


def _roots(cost: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((cost + cost.mT) / 2)
    values = values.clamp_min(float(values.max()) * 1e-8).clamp_min(1e-300).sqrt()
    return vectors * values[:, None, :] @ vectors.mT, vectors / values[:, None, :] @ vectors.mT


def residual(fold: Fold, gram: Tensor, groups: Groups, weight: Tensor | None = None) -> float:
    """Sum over tokens and heads of the squared distance between each head and what the shared one gives back.

    `weight` `[K, D, D]` measures head j's distance e as e^T weight[j] e.
    """
    heads, width = fold.into.shape[:2]
    table = gram.to(torch.float64).reshape(heads, width, heads, width)
    total = 0.0
    for group in groups:
        members = torch.tensor(group)
        size = len(group) * width
        block = table[members][:, :, members].reshape(size, size)
        back = fold.back[members].reshape(size, width)
        into = fold.into[members].transpose(0, 1).reshape(width, size)
        left = torch.eye(size, dtype=torch.float64) - back @ into
        error = left @ block @ left.T
        cost = torch.eye(size, dtype=torch.float64) if weight is None else torch.block_diag(*weight[members])
        total += float((error * cost).sum())
    return total


def order_groups(heads: int, count: int) -> Groups:
    """Neighbouring heads together."""
    size = heads // count
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(count))


def pair_losses(gram: Tensor, width: int, pairs: Tensor, weight: Tensor | None, aligned: bool) -> Tensor:
    """What sharing one head costs each two heads, `[K, K]`, as a share of the energy of all heads together.

    `aligned` lets the two heads share as `svd_fold` would; otherwise they are averaged.
    """
    heads = gram.shape[0] // width
    table = gram.to(torch.float64).reshape(heads, width, heads, width).transpose(1, 2)
    own = table.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    cost = torch.eye(width, dtype=torch.float64).expand(heads, width, width) if weight is None else weight
    energy = (own * cost).sum().clamp_min(1e-300)
    if not aligned:
        apart = own[:, None] + own[None, :] - table - table.mT
        return ((cost[:, None] + cost[None, :]) * apart).sum((-1, -2)) / 4 / energy
    losses = torch.zeros(heads, heads, dtype=torch.float64)
    if len(pairs):
        a, b = pairs[:, 0], pairs[:, 1]
        size = _positive(cost[:, a, a] + cost[:, b, b]).sqrt() if weight is not None else torch.ones(heads, len(pairs))
        both = size[:, None] * size[None, :]
        real, imaginary = table[:, :, a, a] + table[:, :, b, b], table[:, :, b, a] - table[:, :, a, b]
        alone = (real * both).diagonal(dim1=0, dim2=1).T
        middle, gap = (alone[:, None] + alone[None, :]) / 2, (alone[:, None] - alone[None, :]) / 2
        losses += (middle - torch.sqrt(gap**2 + (real**2 + imaginary**2) * both**2)).sum(-1)
    free = torch.tensor(sorted(set(range(width)) - set(pairs.reshape(-1).tolist())), dtype=torch.long)
    if len(free):
        root = _roots(cost[:, free][:, :, free])[0]
        rest = root[:, None] @ table[:, :, free][:, :, :, free] @ root[None, :]
        for i in range(heads):
            for j in range(i):
                joint = torch.cat([torch.cat([rest[i, i], rest[i, j]], 1), torch.cat([rest[j, i], rest[j, j]], 1)])
                lost = torch.linalg.eigvalsh((joint + joint.T) / 2)[: len(free)].sum()
                losses[i, j] += lost
                losses[j, i] += lost
    return losses.fill_diagonal_(0) / energy


def similar_groups(losses: Tensor, count: int) -> Groups:
    """Groups of equal size that cost little: the better of two starts, improved by swaps until none helps.

    One start is the order of the heads, so that the result never costs more than neighbours do.
    """
    heads = losses.shape[0]
    likeness = -(losses + losses.T) / 2
    starts = [[list(group) for group in order_groups(heads, count)], _greedy(likeness, count)]
    improved = [_swap(likeness, start) for start in starts]
    best = max(improved, key=lambda groups: sum(_within(likeness, group) for group in groups))
    return tuple(sorted(tuple(sorted(group)) for group in best))


def _within(likeness: Tensor, group: list[int]) -> float:
    index = torch.tensor(group)
    return sum(likeness[index][:, index].sum(0).tolist(), 0.0)


def _greedy(likeness: Tensor, count: int) -> list[list[int]]:
    size = likeness.shape[0] // count
    left = list(range(likeness.shape[0]))
    groups = []
    for _ in range(count):
        # The head with the least in common with the rest chooses first: it has the fewest good partners.
        group = [min(left, key=lambda i: float(likeness[i, left].sum()))]
        left.remove(group[0])
        while len(group) < size:
            best = max(left, key=lambda i: float(likeness[i, group].sum()))
            group.append(best)
            left.remove(best)
        groups.append(group)
    return groups


def _swap(likeness: Tensor, groups: list[list[int]]) -> list[list[int]]:
    table = likeness.tolist()

    def ties(head: int, group: list[int], without: int) -> float:
        return sum((float(table[head][i]) for i in group if i not in (head, without)), 0.0)

    changed = True
    while changed:
        changed = False
        for x in range(len(groups)):
            for y in range(x + 1, len(groups)):
                for i in range(len(groups[x])):
                    for j in range(len(groups[y])):
                        a, b = groups[x][i], groups[y][j]
                        now = ties(a, groups[x], a) + ties(b, groups[y], b)
                        then = ties(a, groups[y], b) + ties(b, groups[x], a)
                        if then > now + 1e-12:
                            groups[x][i], groups[y][j] = b, a
                            changed = True
    return groups


def query_cost(gram: Tensor, kv_heads: int, width: int) -> Tensor:
    """What an error in each key costs, `[K, D, D]`: the sum of q q^T over the query heads that read it.

    `gram` `[H D, H D]` is of all query heads; rotation by one angle does not change the traces that pairs use.
    """
    each = gram.shape[0] // width // kv_heads
    table = gram.to(torch.float64).reshape(kv_heads, each, width, kv_heads, each, width)
    return torch.einsum("krdkre->kde", table)


def output_cost(weights: WeightStore, linear: Linear, columns: Tensor, kv_heads: int) -> Tensor:
    """What an error in each value costs, `[K, E, E]`: the sum of W^T W over the columns of its query heads."""
    weight = weights.evaluate(linear.weight, torch.float64)
    matrix = weight if linear.in_axis == 1 else weight.T
    parts = matrix[:, columns.reshape(-1)].T.reshape(kv_heads, -1, columns.shape[1], matrix.shape[0])
    return torch.einsum("kreo,krfo->kef", parts, parts)
