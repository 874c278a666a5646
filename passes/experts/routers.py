"""Matrices of routers: what makes the scores of the experts."""

from __future__ import annotations

from zlib import crc32

import torch

from graphopt.observe import Activity, Grouped

Groups = tuple[tuple[int, ...], ...]


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
    target = summed(found.cross, norms, groups)
    target = target - target.mean(-1, keepdim=True)
    inputs = found.inputs
    damping = ridge * inputs.diagonal().mean().clamp_min(torch.finfo(inputs.dtype).tiny)
    weights = torch.linalg.solve(inputs + damping * torch.eye(len(inputs), dtype=inputs.dtype), target)
    deviation = ((weights * (inputs @ weights)).sum(0).mean() / max(found.count, 1)).sqrt()
    return (spread * weights / deviation.clamp_min(torch.finfo(inputs.dtype).tiny)).T.contiguous()


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
