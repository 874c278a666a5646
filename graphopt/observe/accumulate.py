"""Accumulators: statistics that merge exactly, so that they do not depend on how the text was batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.diagnostics import PlanError
from graphopt.observe.taps import (
    Activity,
    Cosine,
    Gram,
    Grouped,
    Moments,
    Routing,
    RowsSeen,
    Statistic,
    Tap,
    Taylor,
)

# Tokens whose values a `rows` tap keeps: enough for an error, and 64 MiB in float32 at a width of 4096.
MOST_ROWS = 4096


@dataclass(frozen=True)
class Tokens:
    """Which positions of a batch count: `mask` `[B, S]` is true at real tokens; `whole` when all are."""

    mask: torch.Tensor
    whole: bool

    def features(self, value: torch.Tensor, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
        """The counted tokens of a value as `[n, d]`, and the sample `[n]` of each.

        Raises PlanError when the value's axes do not say which positions are padding.
        """
        batch, length = self.mask.shape
        if tap.layout == "heads":
            if value.dim() != 4:
                raise _misfit(tap, value, "[batch, heads, tokens, head size]")
            value = value.transpose(1, 2).flatten(2)
        elif value.dim() < 2:
            raise _misfit(tap, value, "[..., features]")
        rows = value.reshape(-1, value.shape[-1])
        if tap.layout == "choices" and value.shape[0] % (batch * length):
            raise _misfit(tap, value, f"[{batch * length} times the choices of a token, ...]")
        if tap.layout == "choices" or tuple(value.shape[:2]) == (batch, length) or value.shape[0] == batch * length:
            each = rows.shape[0] // (batch * length)
            mask = self.mask.reshape(-1).repeat_interleave(each)
        elif self.whole and value.shape[0] == batch:
            each = rows.shape[0] // batch
            mask = self.mask.new_ones(rows.shape[0])
            return rows, torch.arange(batch, device=rows.device).repeat_interleave(each)
        else:
            raise _misfit(tap, value, f"[{batch}, {length}, ...] or [{batch * length}, ...]")
        sample = torch.arange(batch, device=rows.device).repeat_interleave(length * each)
        return (rows, sample) if self.whole else (rows[mask], sample[mask])


def _misfit(tap: Tap, value: torch.Tensor, wanted: str) -> PlanError:
    return PlanError.of(
        "tap_shape",
        f"a tap on %{tap.node} expects {wanted}, but the node gives {list(value.shape)}",
        help=("tap a node that has one row of features for each token",),
    )


class Accumulator:
    """Takes values batch by batch and returns one statistic.

    What a batch adds is a state of its own, so that batches may be seen by different processes. Where states are small
    (`replayed`) they are merged batch by batch in order and the bits do not depend on who saw what; else each process
    adds up its own first, and sums differ in their rounding.
    """

    replayed: ClassVar[bool] = True

    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """The state of one batch: of the tapped node's value (and of the node that it is compared with)."""
        raise NotImplementedError

    def merge(self, state: Any) -> None:
        """Take a state in."""
        raise NotImplementedError

    def state(self) -> Any:
        """What was taken in so far; only of accumulators that are not replayed."""
        raise NotImplementedError

    def add(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> None:
        """Take one batch in."""
        self.merge(self.partial(tokens, value, other))

    def result(self) -> Statistic:
        """The statistic of all batches."""
        raise NotImplementedError


class MomentsAccumulator(Accumulator):
    """Mean and variance by the parallel update of Chan, Golub and LeVeque (1979); plain sums for the others."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.scatter = torch.zeros((), dtype=torch.float64)
        self.absolute = torch.zeros((), dtype=torch.float64)
        self.square = torch.zeros((), dtype=torch.float64)
        self.samples = torch.zeros((), dtype=torch.float64)

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Count, mean, scatter around it and sums of one batch."""
        rows, sample = tokens.features(value, self.tap)
        x = rows.to(torch.float64)
        n = x.shape[0]
        if n == 0:
            return None
        mean = x.mean(0)
        scatter = (x - mean).square_().sum(0)
        square = x.square().sum(0)
        # `x` may be the tapped value itself, so that it is not changed in place.
        x = x.abs()
        sums, counts = _by_sample(x, sample, tokens.mask.shape[0])
        samples = (sums / counts.clamp_min(1)[:, None]).square().sum(0)
        return n, mean, scatter, x.sum(0), square, samples

    def merge(self, state: Any) -> None:
        """Merge one batch."""
        if state is None:
            return
        n, mean, scatter, absolute, square, samples = state
        total = self.count + n
        gap = mean - self.mean
        self.scatter = self.scatter + scatter + gap.square() * (self.count * n / total)
        self.mean = self.mean + gap * (n / total)
        self.count = total
        self.absolute = self.absolute + absolute
        self.square = self.square + square
        self.samples = self.samples + samples

    def result(self) -> Moments:
        """The moments; the variance is that of the population."""
        n = max(self.count, 1)
        return Moments(self.count, self.mean, self.scatter / n, self.absolute / n, self.square / n, self.samples.sqrt())


class GramAccumulator(Accumulator):
    """Sum of x x^T."""

    replayed = False

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.gram = torch.zeros((), dtype=torch.float64)

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Count, sum and products of one batch."""
        x = tokens.features(value, self.tap)[0].to(torch.float64)
        return x.shape[0], x.sum(0), x.T @ x

    def merge(self, state: Any) -> None:
        """Add up."""
        count, total, gram = state
        self.count += count
        self.total = self.total + total
        self.gram = self.gram + gram

    def state(self) -> Any:
        """The sums so far."""
        return self.count, self.total, self.gram

    def result(self) -> Gram:
        """The Gram matrix and the mean."""
        return Gram(self.count, self.total / max(self.count, 1), self.gram)


class CosineAccumulator(Accumulator):
    """Sum over tokens of a cosine."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Count and sum of one batch."""
        if other is None or other.shape != value.shape:
            raise PlanError.of("tap_shape", f"%{self.tap.node} and %{self.tap.other} have different shapes")
        x = tokens.features(value, self.tap)[0].to(torch.float64)
        y = tokens.features(other, self.tap)[0].to(torch.float64)
        return x.shape[0], torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-30).sum()

    def merge(self, state: Any) -> None:
        """Add up."""
        self.count += state[0]
        self.total = self.total + state[1]

    def result(self) -> Cosine:
        """The mean cosine."""
        return Cosine(self.count, float(self.total) / max(self.count, 1))


class TaylorAccumulator(Accumulator):
    """First-order terms by sample; `other` is the gradient of the value."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.terms: list[torch.Tensor] = []

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Terms of one batch's samples."""
        if other is None:
            raise PlanError.of("tap_without_gradient", f"the loss does not depend on %{self.tap.node}")
        rows, sample = tokens.features(value.to(torch.float64) * other.to(torch.float64), self.tap)
        return rows.shape[0], _by_sample(rows, sample, tokens.mask.shape[0])[0]

    def merge(self, state: Any) -> None:
        """Append one batch's samples."""
        self.count += state[0]
        self.terms.append(state[1])

    def result(self) -> Taylor:
        """All samples in the order they came."""
        return Taylor(self.count, torch.cat(self.terms))


class RoutingAccumulator(Accumulator):
    """How often each expert is chosen and what it counts; `other` is the node of what the choices count."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.chosen = torch.zeros(0, dtype=torch.float64)
        self.share = torch.zeros(0, dtype=torch.float64)

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Count and sums of one batch."""
        if other is None or other.shape != value.shape:
            raise PlanError.of("tap_shape", f"%{self.tap.node} and %{self.tap.other} have different shapes")
        index = tokens.features(value, self.tap)[0]
        share = tokens.features(other, self.tap)[0].to(torch.float64)
        size = int(index.max()) + 1 if index.numel() else 0
        chosen = torch.bincount(index.reshape(-1), minlength=size).to(torch.float64)
        return index.shape[0], chosen, torch.bincount(index.reshape(-1), share.reshape(-1), minlength=size)

    def merge(self, state: Any) -> None:
        """Add up."""
        count, chosen, share = state
        self.count += count
        self.chosen, self.share = _longer(self.chosen, chosen), _longer(self.share, share)

    def result(self) -> Routing:
        """The sums."""
        return Routing(self.count, self.chosen, self.share)


class RowsAccumulator(Accumulator):
    """The values of the first tokens."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.held: list[torch.Tensor] = []
        self.room = MOST_ROWS

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """The rows of one batch."""
        rows = tokens.features(value, self.tap)[0]
        return rows.shape[0], rows[:MOST_ROWS].clone()

    def merge(self, state: Any) -> None:
        """Keep what there is room for."""
        self.count += state[0]
        self.held.append(state[1][: self.room])
        self.room -= len(self.held[-1])

    def result(self) -> RowsSeen:
        """The rows in the order they came."""
        return RowsSeen(self.count, torch.cat(self.held))


class ActivityAccumulator(Accumulator):
    """Sums of products of absolute values with each other and with another node's features."""

    replayed = False

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.count = 0
        self.sums = [torch.zeros((), dtype=torch.float64) for _ in range(4)]

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """Count and sums of one batch."""
        if other is None:
            raise PlanError.of("tap_other", f"an activity tap on %{self.tap.node} needs a node to relate it to")
        a = tokens.features(value, self.tap)[0].to(torch.float64).abs()
        x = tokens.features(other, self.tap)[0].to(torch.float64)
        return a.shape[0], [a.sum(0), a.T @ a, x.T @ x, x.T @ a]

    def merge(self, state: Any) -> None:
        """Add up."""
        self.count += state[0]
        self.sums = [mine + theirs for mine, theirs in zip(self.sums, state[1], strict=True)]

    def state(self) -> Any:
        """The sums so far."""
        return self.count, self.sums

    def result(self) -> Activity:
        """Sums and the mean."""
        total, together, inputs, cross = self.sums
        return Activity(self.count, total / max(self.count, 1), together, inputs, cross)


class GroupedAccumulator(Accumulator):
    """Sums of absolute values by the number that another node gives each token, or by sample."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(tap)
        self.found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def partial(self, tokens: Tokens, value: torch.Tensor, other: torch.Tensor | None) -> Any:
        """The numbers that occur in one batch, with their counts and sums."""
        rows, sample = tokens.features(value, self.tap)
        if other is not None:
            numbers = tokens.features(other.unsqueeze(-1), self.tap)[0][:, 0]
            unique, place = torch.unique(numbers, return_inverse=True)
        else:
            unique, place = torch.arange(tokens.mask.shape[0]), sample
        sums, counts = _by_sample(rows.to(torch.float64).abs(), place, len(unique))
        return unique, counts.to(torch.float64), sums

    def merge(self, state: Any) -> None:
        """Add up by number, or append the batch's samples."""
        unique, counts, sums = state
        if self.tap.other is None or not self.found:
            self.found.append((unique, counts, sums))
            return
        before, old_counts, old_sums = self.found[0]
        both, place = torch.unique(torch.cat([before, unique]), return_inverse=True)
        total = sums.new_zeros(len(both), sums.shape[1]).index_add_(0, place, torch.cat([old_sums, sums]))
        many = counts.new_zeros(len(both)).index_add_(0, place, torch.cat([old_counts, counts]))
        self.found = [(both, many, total)]

    def result(self) -> Grouped:
        """Counts and sums by number, which begins at 0, or by sample in their order."""
        if self.tap.other is None:
            return Grouped(torch.cat([c for _, c, _ in self.found]), torch.cat([s for _, _, s in self.found]))
        unique, counts, sums = self.found[0]
        size = int(unique.max()) + 1
        return Grouped(
            counts.new_zeros(size).index_copy_(0, unique, counts),
            sums.new_zeros(size, sums.shape[1]).index_copy_(0, unique, sums),
        )


def _longer(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum of two vectors, the shorter of which ends in zeros."""
    total = one.new_zeros(max(len(one), len(other)))
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def _by_sample(rows: torch.Tensor, sample: torch.Tensor, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    sums = rows.new_zeros(samples, rows.shape[1]).index_add_(0, sample, rows)
    return sums, torch.bincount(sample, minlength=samples).to(rows.dtype)


ACCUMULATORS: dict[str, type[Accumulator]] = {
    "moments": MomentsAccumulator,
    "gram": GramAccumulator,
    "cosine": CosineAccumulator,
    "taylor": TaylorAccumulator,
    "routing": RoutingAccumulator,
    "rows": RowsAccumulator,
    "activity": ActivityAccumulator,
    "grouped": GroupedAccumulator,
}
