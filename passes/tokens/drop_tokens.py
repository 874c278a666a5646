"""Fewer tokens in later layers: those of a picture or a text that score least leave the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.passes.tokens.base import TokenPass
from graphopt.passes.tokens.options import Attention, Kept, Norm, Predictor, Score
from graphopt.passkit.base import Context
from graphopt.passkit.training import KeptLoss, Losses, Recipe, Training
from graphopt.spec import Percent, ScalarError

if TYPE_CHECKING:
    from graphopt.passes.tokens.admit import Admit
    from graphopt.passes.tokens.span import Span
    from graphopt.passes.tokens.stage import Selection, Stage
    from graphopt.passkit.edits import Edit, Plan, Train


class DropTokens(TokenPass):
    """Let tokens leave in front of chosen layers: from there on nothing computes, caches or attends to them.

    `span` says which may leave. `patches` are those of a picture in a vision model (what stands beside them, a class
    token, stays). `image` are the tokens of a text that stand for pictures. `text` are all tokens of a text but the
    `first` and `last` ones. `layers` counts the layers of their stack, and `keep` says how many stay there. A list of
    shares of the whole span has one for each layer (PyramidDrop, arXiv 2410.17247). One share is of what the layer before
    it left. `score` ranks them, in each row over all its pictures: of equal scores the earlier token stays.

    `action: merge` averages each token that leaves into the most similar one that stays of its span (after ToMe, arXiv
    2210.09461). With `positions: keep` tokens keep their places; `renumber` counts those that are left.

    Tokens of a text that stand for patches leave with these, in front of the first layer of the text. A `predictor` is
    trained by `recipe` while all other weights stay; the calibration data may be text, or rows of the program's inputs in
    a .safetensors file.

    The results keep their shapes: where a result has an entry for each token, that of a token that has left is zero,
    and so is that of padding. The last token of a text never leaves. Rows may hold different numbers of pictures; a row
    with fewer than the others needs as much padding as those lose, and is refused where it has less.

    While a text is written, the prompt alone decides: what leaves is chosen among its tokens and by them, and no word
    behind it leaves. That holds with a cache (insert_cache), whose later layers hold as much less, and without one. With
    `past: drop` words behind the prompt see in no layer what the last stage does not leave, so that the caches of all
    layers in front of it lose that as well, when the prompt has run (the decode stage of MustDrop, arXiv 2411.10803).

    `span: answer` is about the words behind a prompt, and about what caches hold (Dynamic-LLaVA, arXiv 2412.00876). A
    predictor in front of one layer decides about each by its own vector. From that layer on a word that it does not admit
    is seen by itself and by no later word, so that caches there (insert_cache) need not hold it; it is computed in all
    layers, and no place changes. `keep` is the share that training aims at, by `loss: {kept: {weight: 100}}` unless it
    says another weight; how much is admitted is what the text makes of it. The prompt is admitted whole. Where none is
    given, in training and when a whole text is run, all words are judged. Tokens that stand for pictures are not.

    ```yaml
    - use: drop_tokens
      span: image
      layers: [1, 2, 3]
      keep: [50%, 25%, 12.5%]
      score: {kind: attention, of: last, at: next}
    ```
    """

    name: ClassVar[str] = "drop_tokens"

    score: Score = Norm()
    """by what they are ranked"""
    action: Literal["drop", "merge"] = "drop"
    """what becomes of those that leave"""
    loss: Losses = Losses(next_token=1.0)
    """what a predictor is trained by"""
    teacher: Annotated[str, Field(examples=["before", "original"])] = "before"
    """the program that loss terms compare with: `original`, `before`, or the id of an earlier step"""
    recipe: Recipe | None = Recipe(steps=500)
    """steps, batches and rates of a predictor's training; none leaves it untrained"""
    first: Annotated[int, Field(ge=0, le=1 << 20)] = 1
    """tokens at the beginning of a text that stay"""
    last: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    """tokens at the end of a text that stay"""

    @model_validator(mode="after")
    def _fits(self) -> DropTokens:
        for field in ("first", "last"):
            if field in self.model_fields_set and self.span != "text":
                raise ScalarError.about("unread", f"drop_tokens reads {field} only with span: text")
        if self.span == "answer":
            self._admits()
        if isinstance(self.score, Attention):
            wrong = {"class": self.span != "patches", "last": self.span == "patches", "text": self.span != "image"}
            if wrong.get(self.score.of, False):
                raise ScalarError.about(
                    "unread", f"span: {self.span} has no {self.score.of} token to score by", help=("use of: all",)
                )
        amounts = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if self.span == "text" and any(isinstance(amount.value, int) for amount in amounts):
            raise ScalarError.about("bad_unit", "texts differ in length: keep a share of their tokens, such as 50%")
        return self

    def _admits(self) -> None:
        """Raise ScalarError for what an answer has no use for."""
        if not isinstance(self.score, Predictor):
            raise ScalarError.about(
                "unread",
                "words of an answer come one by one: a predictor decides about each",
                help=("score: predictor",),
            )
        if not isinstance(self.keep, Kept) or not isinstance(self.keep.value, Percent):
            raise ScalarError.about("bad_unit", "of an answer one share is kept, such as keep: 50%")
        plain = {"action": "drop", "positions": "keep", "past": "keep"}
        for field, value in plain.items():
            if getattr(self, field) != value:
                raise ScalarError.about("unread", f"an answer knows {field}: {value} alone")

    @property
    def ends(self) -> tuple[int, int]:
        """How many tokens at the beginning and at the end of a text stay."""
        return self.first, self.last

    @property
    def learns(self) -> bool:
        """Whether the step trains."""
        return isinstance(self.score, Predictor) and self.recipe is not None

    def needs_calibration(self) -> bool:
        """Predictors train on the calibration data."""
        return self.learns

    def refers_to(self) -> tuple[str, ...]:
        """The teacher, where it is a step."""
        named = self.learns and self.loss.needs_teacher and self.teacher not in ("original", "before")
        return (self.teacher,) if named else ()

    def selection(self, span: Span) -> Selection:
        """By score."""
        from graphopt.passes.tokens.span import NoSpan
        from graphopt.passes.tokens.stage import Selection

        if isinstance(self.score, Attention) and self.score.of == "class" and span.front == 0:
            raise NoSpan("nothing stands in front of the patches, so there is no class token")
        return Selection(span, self.score, self.action, self.positions, self.past)

    def plan(self, context: Context) -> Plan:
        """An edit for each chosen layer, a decline for every other one; none at all where tokens cannot be followed."""
        from graphopt.passkit.edits import Plan

        stages: Sequence[Stage | Admit]
        if self.span == "answer":
            from graphopt.passes.tokens.admit import admits

            assert isinstance(self.score, Predictor)
            assert isinstance(self.keep, Kept)
            stages, declines = admits(context, self.layers, self.score, self.keep)
        else:
            stages, declines = self.stages(context)
        edits: tuple[Edit, ...] = tuple(stages)
        if stages and self.learns and self.recipe is not None:
            edits = (*edits, self._training(context, stages, self.recipe))
        return Plan(edits, tuple(declines))

    def _training(self, context: Context, stages: Sequence[Stage | Admit], recipe: Recipe) -> Train:
        """The predictors alone are trained."""
        from graphopt.passkit.edits import Train, apply_edits

        after = apply_edits(context.program, context.views, tuple(stages))
        names = tuple(dict.fromkeys(name for stage in stages for name in stage.weights))
        loss, teacher = self.loss, self.teacher if self.loss.needs_teacher else None
        if self.span == "answer" and isinstance(self.keep, Kept) and isinstance(self.keep.value, Percent):
            kept = loss.kept or KeptLoss()
            loss = loss.model_copy(update={"kept": kept.model_copy(update={"share": kept.share or self.keep.value})})
        parameters = sum(prod(after.weights[name].expr.shape) for name in names)
        return Train(Training(names, loss, recipe, teacher=teacher), parameters)
