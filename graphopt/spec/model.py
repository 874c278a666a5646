"""What a spec may say, as strict and frozen models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from graphopt.spec.limits import AtMostBytes, AtMostCount, AtMostNumber, AtMostPercent
from graphopt.spec.scalars import ScalarError
from graphopt.spec.selectors import Layers, check_glob
from graphopt.spec.units import ByteSize


class Strict(BaseModel):
    """A model that takes no unknown field, converts nothing and never changes."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True)


class Shorthand:
    """Lets a bare word stand for a mapping: with `Shorthand("kind")`, `uniform` means `{kind: uniform}`."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        full = handler(source)
        word = core_schema.chain_schema(
            [core_schema.no_info_after_validator_function(self.expand, core_schema.str_schema()), full]
        )
        # A before-validator would do, but it turns JSON input into Python input, where strict refuses lists for tuples.
        return core_schema.tagged_union_schema(
            {"word": word, "mapping": full}, lambda value: "word" if isinstance(value, str) else "mapping"
        )

    def expand(self, word: str) -> dict[str, str]:
        """Return the mapping that a word stands for."""
        return {self.key: word}

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        full = handler(schema["choices"]["mapping"])
        return {"anyOf": [{"type": "string", "description": f"short for {{{self.key}: ...}}"}, full]}


class Text(Strict):
    """Text that a model is run over."""

    data: str
    """path of the text, relative to the file that names it"""
    samples: int = Field(ge=1, le=10**6)
    """sequences to take"""
    seq: int = Field(ge=1, le=10**6)
    """tokens in a sequence"""


class Calibration(Text):
    """The text that passes observe the model on."""

    batch: int = Field(default=1, ge=1, le=10**5)
    """sequences in a batch"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """seed of the choice of sequences"""


class Evaluation(Text):
    """The text that perplexity is measured on."""


class Verify(Strict):
    """How much of what passes promise is checked after every step."""

    level: Literal["full", "shapes", "off"] = "full"


class PerplexityCheck(Strict):
    """Bounds on perplexity over the evaluation text."""

    increase: AtMostPercent | None = None
    """rise over the original model, such as `at most 5%`"""
    value: AtMostNumber | None = None
    """the perplexity itself, such as `at most 20`"""


class Checks(Strict):
    """Bounds that fail the run when missed."""

    perplexity: PerplexityCheck | None = None
    parameters: AtMostCount | None = None
    flops: AtMostCount | None = None
    kv_bytes: AtMostBytes | None = None
    bytes: AtMostBytes | None = None


class Save(Strict):
    """What is written."""

    format: Literal["auto", "transformers", "graphopt"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    """type of the saved weights; the model's own where absent"""
    shard_size: ByteSize | None = None
    """largest size of one file"""


def _some(paths: tuple[str, ...]) -> tuple[str, ...]:
    if not paths:
        raise ScalarError.about("selector_empty", "an empty list selects nothing", help=("leave 'paths' out",))
    return paths


class Where(Strict):
    """What a step is about; everything where absent."""

    layers: Layers = Layers(((0, -1),))
    paths: Annotated[tuple[Annotated[str, AfterValidator(check_glob)], ...], AfterValidator(_some)] | None = None
    """globs over module paths: `*` within a name, `**` over any number of names"""


class StepHead(Strict):
    """The fields that every step may have, whatever its pass."""

    use: str
    """name of a registered pass"""
    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")] | None = None
    """name of this step; the pass's own where absent"""
    optional: bool = False
    """whether changing nothing is allowed"""
    where: Where | None = None


class Spec(Strict):
    """A whole spec; `steps` are the steps as they run, inherited ones in their places."""

    graphopt: Literal[1]
    """version of the format"""
    name: str | None = Field(default=None, max_length=200)
    description: str | None = Field(default=None, max_length=10_000)
    extends: tuple[str, ...] = ()
    """files whose settings, but not steps, are taken over; later ones win, this file wins over all"""
    model: str | None = Field(default=None, min_length=1, max_length=1000)
    """a path beginning with ./, ../ or / or the id of a model"""
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    verify: Annotated[Verify, Shorthand("level")] = Verify()
    steps: tuple[dict[str, Any], ...] = ()
    checks: Checks = Checks()
    save: Save = Save()
    seed: int | None = Field(default=None, ge=0, lt=2**63)
