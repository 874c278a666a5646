"""What a spec may say about training, and what a plan asks of the train stage. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from graphopt.spec import ScalarError, Share, Strict

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class LogitsLoss(Strict):
    """T^2 KL(teacher || student) over the vocabulary at temperature T (Hinton et al., arXiv 1503.02531)."""

    weight: Weight = 1.0
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """what both sides' logits are divided by"""


class HiddenLoss(Strict):
    """Squared error of the stream against the teacher's after each block, divided by the teacher's mean square."""

    weight: Weight = 1.0
    blocks: tuple[str, ...] | None = None
    """paths of the blocks to compare; all that both programs have where absent"""


class HeadsLoss(Strict):
    """Cross-entropy of draft heads: head k predicts the token k + 1 places ahead; its weight is decay^k.

    The target is the `text` (Medusa, arXiv 2401.10774) or what the program itself predicts there, its `base`
    distribution (Hydra, arXiv 2402.05109).
    """

    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    target: Literal["text", "base"] = "text"


class KeptLoss(Strict):
    """The squared distance of the share of tokens that a predictor admits from a wanted one (arXiv 2412.00876)."""

    weight: Weight = 100.0
    share: Share | None = None
    """the wanted share; what the step keeps where absent"""


class Losses(Strict):
    """Terms whose weighted sum is minimised; a term that is absent counts nothing."""

    next_token: Weight = 0.0
    """weight of the next-token cross-entropy on the text"""
    logits: LogitsLoss | None = None
    hidden: HiddenLoss | None = None
    heads: HeadsLoss | None = None
    kept: KeptLoss | None = None
    gates: Weight = 0.0
    """weight of the mean gate of bounded caches, in 0..1 (DuoAttention, arXiv 2410.10819)"""

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with another program."""
        return self.logits is not None or self.hidden is not None

    @model_validator(mode="after")
    def _some(self) -> Losses:
        weights = [
            self.next_token,
            self.gates,
            *(term.weight for term in (self.logits, self.hidden, self.heads, self.kept) if term),
        ]
        if not any(weights):
            raise ScalarError.about("no_loss", "all loss terms have weight 0", help=("write logits: {weight: 1}",))
        return self


class Lora(Strict):
    """Matrices train as W + (alpha / rank) B A with B zero at first, and are merged at the end (arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    alpha: Annotated[float, Field(gt=0, le=1e4)] = 16.0


class Recipe(Strict):
    """How the weights move: AdamW (arXiv 1711.05101) on sequences of the calibration text."""

    steps: Annotated[int, Field(ge=1, le=10**7)] = 200
    """updates of the weights"""
    batch: Annotated[int, Field(ge=1, le=10**5)] = 8
    """sequences of one forward run"""
    accumulate: Annotated[int, Field(ge=1, le=10**4)] = 1
    """forward runs of one update, whose gradients are averaged"""
    seq: Annotated[int, Field(ge=2, le=10**6)] = 128
    """tokens in a sequence"""
    rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1e-3
    """largest learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the rate falls after the warm-up"""
    warmup: Annotated[int, Field(ge=0, le=10**6)] = 20
    """steps over which the rate rises to its largest"""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """share of the largest rate that is left after the last step"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """weight decay"""
    clip: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    """largest norm of the whole gradient"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of the order of the text and of new LoRA matrices"""


@dataclass(frozen=True)
class Training:
    """What a plan asks of the train stage after its edits: `weights` by name may change, all others stay as they are.

    `teacher` is `original` (the program before the first step), `before` (the one before this step), the id of an
    earlier step (what that one left), or None when no term needs one.
    """

    weights: tuple[str, ...]
    losses: Losses
    recipe: Recipe
    lora: Lora | None = None
    teacher: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail; weights are counted there, because they are many."""
        return {
            "weights": len(self.weights),
            "losses": self.losses.model_dump(mode="json", exclude_none=True),
            "recipe": self.recipe.model_dump(mode="json", exclude_defaults=True) | {"steps": self.recipe.steps},
            "lora": self.lora.model_dump(mode="json") if self.lora else None,
            "teacher": self.teacher,
        }
