"""What a spec may say about the choice of tokens. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from graphopt.select.options import Choice
from graphopt.spec import Percent, ScalarError, Shorthand
from graphopt.spec.scalars import scalar_schema


class Norm(Choice):
    """How large a token's vector in the residual stream is."""

    kind: Literal["norm"] = "norm"


class Random(Choice):
    """Nothing but chance, the same at equal places: what any other score has to beat."""

    kind: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Attention(Choice):
    """The attention that a token receives, the mean over heads.

    From the `last` token (PyramidDrop, arXiv 2410.17247; FastV, arXiv 2403.06764), from what stands in front of the
    patches (`class`; EViT, arXiv 2202.07800), from the tokens of the text (`text`; MustDrop, arXiv 2411.10803) or from
    `all`.
    """

    kind: Literal["attention"] = "attention"
    of: Literal["last", "class", "text", "all"] = "all"
    """the queries"""
    at: Literal["before", "next"] = "before"
    """the layer whose attention counts: that before the tokens leave, or the next, whose queries and keys are computed"""


class Similarity(Choice):
    """The cosine of a token's vector with the mean direction of the text, or of the class token."""

    kind: Literal["similarity"] = "similarity"


class Predictor(Choice):
    """A small network of its own at each stage, GELU(W x + b) and one product, trained by the step's recipe.

    After Dynamic-LLaVA (arXiv 2412.00876), whose predictor is deeper and learns by Gumbel noise in the attention. Here
    the number of tokens is fixed, and a token that stays learns by what its values give to others in later attention.
    About words of an answer it decides one by one, by the sign, and each learns by what its weight in the softmax would
    change.
    """

    kind: Literal["predictor"] = "predictor"
    width: Annotated[int, Field(ge=1, le=1 << 14)] = 32
    """neurons"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """seed of its first weights"""


class Pairs(Choice):
    """Every second token may go, those first that have a likeness among the others (ToMe, arXiv 2210.09461)."""

    kind: Literal["pairs"] = "pairs"


class Windows(Choice):
    """The tokens of a window of the grid of patches but its first may go, those of the most uniform windows first.

    A window is as uniform as its tokens' mean cosine with each other (MustDrop, arXiv 2411.10803).
    """

    kind: Literal["windows"] = "windows"
    size: Annotated[int, Field(ge=2, le=64)] = 3
    """rows and columns of a window"""


Alike = Annotated[Pairs | Windows, Field(discriminator="kind"), Shorthand("kind")]


class Carried(Choice):
    """Tokens whose patches have left; no option of a spec."""

    kind: Literal["carried"] = "carried"


Score = Annotated[Norm | Random | Attention | Similarity | Predictor, Field(discriminator="kind"), Shorthand("kind")]


class Kept:
    """How many tokens of a span stay: a share, or a number of each picture's."""

    __slots__ = ("value",)

    def __init__(self, value: Percent | int) -> None:
        self.value = value

    @classmethod
    def parse(cls, value: object) -> Kept:
        """Return what a value means; anything else raises ScalarError."""
        if isinstance(value, Kept):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ScalarError.about("out_of_range", f"{value} tokens cannot stay")
            return cls(value)
        share = Percent.parse(value)
        if share.fraction > 1:
            raise ScalarError.about("out_of_range", f"{share} is more than 100%")
        return cls(share)

    def of(self, count: int) -> tuple[int, int]:
        """The share that stays of a span of `count` tokens as a fraction (numerator, denominator)."""
        if isinstance(self.value, int):
            return min(self.value, count), max(1, count)
        return self.value.fraction.numerator, self.value.fraction.denominator

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __str__(self) -> str:
        return str(self.value)

    __repr__ = __str__

    def plain(self) -> str | int:
        """What a spec says for it."""
        return self.value if isinstance(self.value, int) else str(self.value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return scalar_schema(cls.parse, cls.plain)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "type": ["integer", "string"],
            "description": "a percentage of the span's tokens, or a number",
            "examples": ["50%", 16],
        }
