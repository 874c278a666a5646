"""What a spec may say about making experts. No torch here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from graphopt.select.options import Choice
from graphopt.spec import Percent, Shorthand

Experts = Annotated[int, Field(ge=2, le=4096)]


class InOrder(Choice):
    """Neurons as they stand: the first expert gets the first ones (the equal decomposition of UoE, arXiv 2503.02495)."""

    kind: Literal["order"] = "order"


class KMeans(Choice):
    """Neurons that are active together on calibration text: k-means with clusters of equal size (arXiv 2110.01786)."""

    kind: Literal["kmeans"] = "kmeans"
    alike: Literal["correlation", "coactivation"] = "coactivation"
    """what likens two neurons: the correlation of their absolute activations over tokens, or how much both are active"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Masks(Choice):
    """The most active neurons of each domain, those that all domains keep apart (Read-ME, arXiv 2410.19123).

    The calibration text holds the domains one after another in equal parts. Experts may overlap: legal for one a token.
    """

    kind: Literal["masks"] = "masks"
    keep: Percent = Percent.parse("50%")
    """share of the neurons that a domain keeps"""


Partition = Annotated[InOrder | KMeans | Masks, Field(discriminator="kind"), Shorthand("kind")]
Spread = Annotated[float, Field(gt=0, le=100)]


class Zero(Choice):
    """All scores are 0: legal when every expert is chosen, and then the result is that of the dense feed-forward."""

    kind: Literal["zero"] = "zero"


class Random(Choice):
    """A random matrix: the baseline for routers that know something."""

    kind: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    spread: Spread = 0.1
    """standard deviation of the scores for inputs of size 1"""


class Static(Choice):
    """The same experts for every token: those that add most in the mean on calibration text."""

    kind: Literal["static"] = "static"
    spread: Spread = 0.1
    """standard deviation of the scores"""


class Fitted(Choice):
    """Scores by ridge regression from a feed-forward's input to what each expert's neurons add on calibration text.

    That is the sum of their absolute activations times the norms of their output columns.
    """

    kind: Literal["fitted"] = "fitted"
    ridge: Annotated[float, Field(ge=1e-9, le=1e3)] = 1e-3
    """damping, as a share of the mean square of the inputs"""
    spread: Spread = 0.1
    """standard deviation of the scores, which says how unequal the weights of the chosen experts are"""


class Trained(Choice):
    """Scores trained on the dense model's own activations to choose the experts that a token would miss most.

    For each of the first 4,096 tokens of the calibration text experts are taken one after another, each time the one that
    leaves least of the squared output, as many as a token goes to. Scores are fitted to the norms of what experts add, and
    then trained by logistic regression to tell those that were taken, a mistake counting what it costs of that square.
    """

    kind: Literal["trained"] = "trained"
    steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    """iterations of L-BFGS over all of these tokens at most"""
    ridge: Annotated[float, Field(ge=1e-9, le=1e3)] = 1e-3
    """damping of the fit, as a share of the mean square of the inputs"""
    spread: Spread = 0.1
    """standard deviation of the scores, which says how unequal the weights of the chosen experts are"""


class Tokens(Choice):
    """One routing for all layers, made before the first: a table of scores by token (decoupled, as in Read-ME).

    A token's scores are what its occurrences in the calibration text add by expert, averaged over the layers. Read-ME trains
    a small network with attention in its place.
    """

    kind: Literal["tokens"] = "tokens"
    spread: Spread = 0.1
    """standard deviation of the scores"""


Router = Annotated[Zero | Random | Static | Fitted | Trained | Tokens, Field(discriminator="kind"), Shorthand("kind")]


class Top(Choice):
    """The k experts with the highest scores."""

    kind: Literal["top"] = "top"
    k: Annotated[int, Field(ge=1, le=4096)] | None = None
    """how many; all where absent"""


class Rank(Choice):
    """Only the expert that comes at one place of the order by scores (arXiv 2405.14507)."""

    kind: Literal["rank"] = "rank"
    rank: Annotated[int, Field(ge=1, le=4096)] = 1
    """1 is the one with the highest score"""


class Threshold(Choice):
    """Of the highest scores those that come close to the best; the others count nothing and are skipped as it runs."""

    kind: Literal["threshold"] = "threshold"
    most: Annotated[int, Field(ge=1, le=4096)] = 2
    """how many are looked at"""
    least: Annotated[float, Field(ge=0, le=1)] = 0.5
    """share of the best one's weight that is enough"""


Choosing = Annotated[Top | Rank | Threshold, Field(discriminator="kind"), Shorthand("kind")]
