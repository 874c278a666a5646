"""Matrices of routers: what makes the scores of the experts."""

from __future__ import annotations

from zlib import crc32

import torch

from graphopt.observe import Activity, Grouped

Groups = tuple[tuple[int, ...], ...]
# Numbers that what experts add to a part of the tokens may have: 64 MiB in float64.
MOST_ADDED = 1 << 23


def zero(experts: int, width: int) -> torch.Tensor:
    """Scores `[E, d]` that are all 0."""
    return torch.zeros(experts, width, dtype=torch.float64)


def random(experts: int, width: int, seed: int, path: str, spread: float) -> torch.Tensor:
    """Normal scores `[E, d]` for inputs of size about 1, another draw for every path."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + crc32(path.encode())) % 2**63)
    return spread * torch.randn(experts, width, dtype=torch.float64, generator=generator) / width**0.5


def summed(values: torch.Tensor, norms: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sums over each group's neurons of `values` `[..., I]` times the norms `[I]` of their output columns: `[..., E]`."""
    member = values.new_zeros(values.shape[-1], len(groups))
    for expert, group in enumerate(groups):
        member[list(group), expert] = 1
    return (values * norms) @ member


def fitted(found: Activity, norms: torch.Tensor, groups: Groups, ridge: float, spread: float) -> torch.Tensor:
    """The linear scores `[E, d]` nearest to how much the neurons of each expert add to a token, by ridge regression.

    What all experts have in common is left out, because it prefers none. The standard deviation of the scores is `spread`,
    so that it alone says how unequal the weights of the chosen are.
    """
    return _regressed(found.inputs, summed(found.cross, norms, groups), found.count, ridge, spread)


def _regressed(inputs: torch.Tensor, cross: torch.Tensor, count: int, ridge: float, spread: float) -> torch.Tensor:
    """Scores `[E, d]` by ridge regression, from the sums over tokens of x x^T `[d, d]` and of x times the targets `[d, E]`."""
    target = cross - cross.mean(-1, keepdim=True)
    damping = ridge * inputs.diagonal().mean().clamp_min(torch.finfo(inputs.dtype).tiny)
    weights = torch.linalg.solve(inputs + damping * torch.eye(len(inputs), dtype=inputs.dtype), target)
    return _spread(weights, inputs, count, spread).T.contiguous()


def _spread(weights: torch.Tensor, inputs: torch.Tensor, count: int, spread: float) -> torch.Tensor:
    """Scores `[d, E]` times a number, so that their standard deviation over tokens is `spread`."""
    deviation = ((weights * (inputs @ weights)).sum(0).mean() / max(count, 1)).sqrt()
    return spread * weights / deviation.clamp_min(torch.finfo(inputs.dtype).tiny)


def trained(
    x: torch.Tensor,
    hidden: torch.Tensor,
    down: torch.Tensor,
    groups: Groups,
    count: int,
    steps: int,
    ridge: float,
    spread: float,
) -> torch.Tensor:
    """Scores `[E, d]` that tell which `count` experts a token would miss most.

    `x` `[N, d]` and `hidden` `[N, I]` are what tokens give to the feed-forward and to its down projection `[out, I]`.
    Scores start as a fit to the norms of what experts add. They are trained by logistic regression about the middle between
    the last score that is chosen and the first that is not, each mistake counting what it costs; the better of the two is
    kept.
    """
    x, hidden, down = x.double(), hidden.double(), down.double()
    sizes, wanted, costs = missed(hidden, down, groups, count)
    inputs = x.T @ x
    start = _regressed(inputs, x.T @ sizes.sqrt(), len(x), ridge, 1.0).T.contiguous()
    if count == len(groups):
        return spread * start.T
    weights = start.clone().requires_grad_()
    each = costs / costs.mean().clamp_min(torch.finfo(costs.dtype).tiny)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = x @ weights
        bounds = scores.topk(count + 1, -1).values[:, -2:].mean(-1, keepdim=True)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(scores - bounds, wanted, each)
        losses.backward()
        return losses

    def cost(scores: torch.Tensor) -> float:
        chosen = torch.zeros_like(wanted).scatter_(1, scores.topk(count, -1).indices, 1.0)
        return float((costs * (chosen - wanted).abs()).sum())

    with torch.enable_grad():
        optimizer.step(loss)
    best = min((weights.detach(), start), key=lambda matrix: cost(x @ matrix))
    return _spread(best, inputs, len(x), spread).T.contiguous()


def missed(
    hidden: torch.Tensor, down: torch.Tensor, groups: Groups, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squares of what each expert adds to each token, 1 for the `count` that it would miss most, and what mistakes cost.

    All are `[N, E]`. Experts are taken one after another, each time the one that leaves least of the square of what all
    neurons add. A mistake costs what the square grows by when the expert and the nearest one on the other side are swapped,
    without what the two have in common.
    """
    neurons = sorted({neuron for group in groups for neuron in group})
    sizes, wanted, costs = (hidden.new_zeros(len(hidden), len(groups)) for _ in range(3))
    # A part of the tokens at a time: every expert adds a row of its own to each.
    part = max(1, MOST_ADDED // (len(groups) * max(len(groups), len(down))))
    for start in range(0, len(hidden), part):
        here = slice(start, start + part)
        rows, taken = hidden[here], wanted[here]
        added = torch.stack([rows[:, list(group)] @ down[:, list(group)].T for group in groups], 1)
        products = added @ added.mT
        left = (added @ (rows[:, neurons] @ down[:, neurons].T)[..., None]).squeeze(-1)
        sizes[here] = own = products.diagonal(dim1=1, dim2=2)
        for _ in range(count):
            best = (2 * left - own).masked_fill(taken > 0, -torch.inf).argmax(-1)
            taken.scatter_(1, best[:, None], 1.0)
            left = left - products[torch.arange(len(rows)), best]
        least_lost = (2 * left + own).masked_fill(taken == 0, torch.inf).amin(-1, keepdim=True)
        most_gained = (2 * left - own).masked_fill(taken > 0, -torch.inf).amax(-1, keepdim=True)
        swapped = torch.where(taken > 0, 2 * left + own - most_gained, least_lost - 2 * left + own)
        costs[here] = swapped.clamp_min(0) if count < len(groups) else 0
    return sizes, wanted, costs


def static(found: Activity, norms: torch.Tensor, groups: Groups, spread: float) -> torch.Tensor:
    """Scores `[E]` that are the same for every token: how much each expert adds in the mean."""
    return _standard(summed(found.mean, norms, groups), spread)


def by_token(
    found: list[Grouped], norms: list[torch.Tensor], groups: list[Groups], rows: int, spread: float
) -> torch.Tensor:
    """A table of scores `[V, E]` for every token: what it adds by expert in the mean, averaged over layers.

    Tokens that calibration did not show get the mean of all.
    """
    total = torch.zeros(rows, len(groups[0]), dtype=torch.float64)
    for layer, norm, group in zip(found, norms, groups, strict=True):
        counts = torch.zeros(rows, dtype=torch.float64)
        counts[: len(layer.counts)] = layer.counts
        means = summed(layer.sums, norm, group) / layer.counts.clamp_min(1)[:, None]
        common = summed(layer.sums.sum(0), norm, group) / layer.counts.sum().clamp_min(1)
        table = common.repeat(rows, 1)
        table[: len(means)][layer.counts > 0] = means[layer.counts > 0]
        total += table / common.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return _standard(total, spread)


def _standard(scores: torch.Tensor, spread: float) -> torch.Tensor:
    centred = scores - scores.mean(-1, keepdim=True)
    deviation = centred.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).tiny)
    return spread * centred / deviation
