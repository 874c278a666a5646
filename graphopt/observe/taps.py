"""Taps: what to watch while calibration text runs through a program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["moments", "gram", "cosine", "taylor", "routing", "rows", "activity", "grouped"]
Layout = Literal["last", "heads", "choices"]


@dataclass(frozen=True)
class Tap:
    """A statistic of one node's value.

    `layout` says what a feature is: `last` takes the last axis and counts every other position as a token;
    `heads` takes `[B, H, S, D]` as B x S tokens of H * D features; `choices` takes `[B x S x k, .., D]`, a row for each of
    a token's k experts, which are counted one by one. `cosine` compares with the node `other`; `routing`
    takes a router's choices `[..., k]`, and what each counts from `other`; `rows` keeps the values of the first tokens;
    `activity` relates the absolute value to the features of `other`; `grouped` sums it up by the whole numbers `[B, S]`
    that `other` holds, or by sample where there is none.
    """

    node: str
    kind: Kind
    layout: Layout = "last"
    other: str | None = None


@dataclass(frozen=True)
class Moments:
    """Per-feature statistics `[d]` in float64: `count` tokens, `mean`, `variance`, `abs_mean`, `square_mean`.

    `sample_l2` is sqrt(sum over samples of (mean over the sample's tokens of |x|)^2), Minitron's aggregate.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    abs_mean: torch.Tensor
    square_mean: torch.Tensor
    sample_l2: torch.Tensor


@dataclass(frozen=True)
class Gram:
    """`gram` `[d, d]` = sum over tokens of x x^T in float64, with `count` and `mean` `[d]`."""

    count: int
    mean: torch.Tensor
    gram: torch.Tensor


@dataclass(frozen=True)
class Cosine:
    """Mean over tokens of the cosine between two nodes' last axes."""

    count: int
    mean: float


@dataclass(frozen=True)
class Taylor:
    """First-order terms `[samples, d]`: per sample, sum over tokens of x * dL/dx, L the next-token loss."""

    count: int
    terms: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """For each expert `[E]`, up to the last that was chosen: `chosen` how many of `count` tokens chose it, `share` the sum
    of what it counted for them.
    """

    count: int
    chosen: torch.Tensor
    share: torch.Tensor


@dataclass(frozen=True)
class RowsSeen:
    """The first values themselves, one row `[n, ...]` a token, in the order that tokens came; of `count` tokens in all."""

    count: int
    rows: torch.Tensor


@dataclass(frozen=True)
class Activity:
    """Absolute values a `[I]` of one node beside the features x `[d]` of another, over `count` tokens, in float64.

    `mean` `[I]` of a, `together` `[I, I]` = sum of a a^T, `inputs` `[d, d]` = sum of x x^T, `cross` `[d, I]` = sum of x a^T.
    """

    count: int
    mean: torch.Tensor
    together: torch.Tensor
    inputs: torch.Tensor
    cross: torch.Tensor


@dataclass(frozen=True)
class Grouped:
    """Sums of absolute values by group: `counts` `[G]` tokens, `sums` `[G, I]`, G the samples or the largest number seen."""

    counts: torch.Tensor
    sums: torch.Tensor


Statistic = Moments | Gram | Cosine | Taylor | Routing | RowsSeen | Activity | Grouped


class Statistics:
    """Statistics by tap; typed getters raise KeyError for a tap that was not observed."""

    def __init__(self, found: Mapping[Tap, Statistic]) -> None:
        self._found = dict(found)

    def __iter__(self) -> Iterator[Tap]:
        return iter(self._found)

    def __getitem__(self, tap: Tap) -> Statistic:
        return self._found[tap]

    def moments(self, node: str, layout: Layout = "last") -> Moments:
        """Moments of a node."""
        found = self._found[Tap(node, "moments", layout)]
        assert isinstance(found, Moments)
        return found

    def gram(self, node: str, layout: Layout = "heads") -> Gram:
        """Gram matrix of a node."""
        found = self._found[Tap(node, "gram", layout)]
        assert isinstance(found, Gram)
        return found

    def cosine(self, node: str, other: str) -> Cosine:
        """Cosine of two nodes."""
        found = self._found[Tap(node, "cosine", "last", other)]
        assert isinstance(found, Cosine)
        return found

    def routing(self, index: str, share: str) -> Routing:
        """Routing by a node of choices and the node of what they count."""
        found = self._found[Tap(index, "routing", "last", share)]
        assert isinstance(found, Routing)
        return found

    def rows(self, node: str) -> RowsSeen:
        """The first values of a node."""
        found = self._found[Tap(node, "rows")]
        assert isinstance(found, RowsSeen)
        return found

    def activity(self, node: str, other: str) -> Activity:
        """Activity of a node beside another."""
        found = self._found[Tap(node, "activity", "last", other)]
        assert isinstance(found, Activity)
        return found

    def grouped(self, node: str, other: str | None = None) -> Grouped:
        """Sums of a node by the numbers of another, or by sample."""
        found = self._found[Tap(node, "grouped", "last", other)]
        assert isinstance(found, Grouped)
        return found

    def taylor(self, node: str, layout: Layout = "last") -> Taylor:
        """Taylor terms of a node."""
        found = self._found[Tap(node, "taylor", layout)]
        assert isinstance(found, Taylor)
        return found
