"""What a spec may say about selection. No torch here: a mistake in a spec is found before torch loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from graphopt.spec import Expr, Percent, ScalarError, Share, Shorthand, Strict
from graphopt.spec.scalars import scalar_schema

Reduce = Literal["mean", "sum", "l2", "max"]
Account = Literal["units", "parameters", "flops", "kv_bytes"]
Compensate = Literal["none", "mean_bias"]


@dataclass(frozen=True, slots=True)
class Amount:
    """How much stays: a percentage, or an expression over the view's own dimensions such as `heads / 2`."""

    value: Percent | Expr

    @classmethod
    def parse(cls, value: object) -> Amount:
        """Return the amount that a value means; anything else raises ScalarError."""
        if isinstance(value, Amount):
            return value
        if isinstance(value, str) and value.rstrip().endswith("%"):
            share = Percent.parse(value)
            if share.fraction > 1:
                raise ScalarError.about("out_of_range", f"{share} is more than 100%")
            return cls(share)
        if isinstance(value, float):
            # 0.75 is no number of units; the error offers 75%.
            Percent.parse(value)
        return cls(Expr.parse(value))

    def of(self, whole: int, dimensions: Mapping[str, int]) -> Fraction:
        """Return the wanted number of units of `whole`; an expression that is no such number raises ScalarError."""
        if isinstance(self.value, Percent):
            return self.value.of(whole)
        wanted = self.value.integer(dimensions)
        if not 0 < wanted <= whole:
            raise ScalarError.about(
                "out_of_range", f"'{self.value}' is {wanted}, but a number from 1 to {whole} can stay"
            )
        return Fraction(wanted)

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "type": ["integer", "string"],
            "description": "a percentage, or a number as an expression over dimensions",
            "examples": ["75%", "heads / 2"],
        }


class Choice(Strict):
    """One of several kinds; its `kind` is written even where it is the default, so that it reads back."""

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": getattr(self, "kind"), **handler(self)}  # noqa: B009


class Magnitude(Choice):
    """L2 norm of all weights that belong to the unit, producers and consumers alike; needs no text."""

    kind: Literal["magnitude"] = "magnitude"


class Fluctuation(Choice):
    """FLAP (arXiv 2312.11983): how much the unit's activation varies, weighted by what reads it.

    wifv is Var(x_j) ||W_j||^2, ifv is Var(x_j), wifn is mean_i |W_ij| ||x_j||; those of attention are squared.
    """

    kind: Literal["fluctuation"] = "fluctuation"
    metric: Literal["wifv", "wifn", "ifv"] = "wifv"
    reduce: Reduce = "mean"
    """how the features of a unit become one score"""


class Activation(Choice):
    """Minitron (arXiv 2407.14679): mean |activation| over a sample's tokens, L2 over samples."""

    kind: Literal["activation"] = "activation"
    reduce: Reduce = "l2"
    """how the features of a unit become one score"""


class TaylorScore(Choice):
    """First-order loss change (arXiv 1906.10771): mean over samples of |sum over the unit of x dL/dx|."""

    kind: Literal["taylor"] = "taylor"


class RoutingScore(Choice):
    """How much a router uses an expert on calibration text."""

    kind: Literal["routing"] = "routing"
    metric: Literal["frequency", "mass"] = "mass"
    """the share of tokens that choose it, or the sum of what it counts for them"""


class Order(Choice):
    """The first units stay: for planning without weights and for nested widths that were sorted before."""

    kind: Literal["order"] = "order"


Score = Annotated[
    Magnitude | Fluctuation | Activation | TaylorScore | Order, Field(discriminator="kind"), Shorthand("kind")
]


ExpertScore = Annotated[Magnitude | RoutingScore | Order, Field(discriminator="kind"), Shorthand("kind")]


class Uniform(Choice):
    """The same share, or number, in every view."""

    kind: Literal["uniform"] = "uniform"
    tolerance: Share = Percent.parse("1%")
    """how far a view may be from its budget, as a share of its units"""


class PerLayer(Choice):
    """One amount for each layer that `where` selects, in order."""

    kind: Literal["per_layer"] = "per_layer"
    keep: Annotated[tuple[Amount, ...], Field(min_length=1)]
    tolerance: Share = Percent.parse("1%")
    """how far a view may be from its budget, as a share of its units"""


class Global(Choice):
    """All views compete in one pool, each unit at its cost (FLAP's AL-AM, arXiv 2312.11983)."""

    kind: Literal["global"] = "global"
    normalise: Literal["zscore", "mean", "none"] = "zscore"
    """how scores of different views become comparable"""
    minimum: int = Field(default=1, ge=1)
    """units that every view keeps at least"""
    tolerance: Share = Percent.parse("1%")
    """how far the pool may be from its budget, as a share of the pool"""


class Explicit(Choice):
    """The units themselves, by layer: those that stay or those that go."""

    kind: Literal["explicit"] = "explicit"
    keep: dict[int, tuple[int, ...]] | None = None
    remove: dict[int, tuple[int, ...]] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Explicit:
        if (self.keep is None) == (self.remove is None):
            raise ScalarError.about("explicit_choice", "say either keep or remove", help=('keep: {"0": [0, 1, 2]}',))
        return self


Allocate = Annotated[Uniform | PerLayer | Global | Explicit, Field(discriminator="kind"), Shorthand("kind")]
AllocateEvenly = Annotated[Uniform, Shorthand("kind")]
AllocatePool = Annotated[Uniform | Global, Field(discriminator="kind"), Shorthand("kind")]


def check_keep(keep: Amount | None, allocate: Uniform | PerLayer | Global | Explicit, known: tuple[str, ...]) -> None:
    """Raise ScalarError unless `keep` is given exactly where the allocator needs it, over dimensions that exist."""
    own = isinstance(allocate, PerLayer | Explicit)
    if own and keep is not None:
        raise ScalarError.about(
            "two_budgets", f"keep and allocate: {{kind: {allocate.kind}}} both say what stays", help=("remove keep",)
        )
    if not own and keep is None:
        raise ScalarError.about("no_budget", "keep is missing: how much stays?", help=("write keep: 75%",))
    amounts = allocate.keep if isinstance(allocate, PerLayer) else () if keep is None else (keep,)
    for amount in amounts:
        if isinstance(amount.value, Expr):
            amount.value.check(known)
