"""What a spec may say about speculative decoding: who drafts, how many rows a step verifies. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from graphopt.select.options import Choice
from graphopt.spec import Shorthand, Strict

Share = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[int, Field(ge=1, le=256)]


class RecycleDrafter(Choice):
    """The likeliest tokens behind each token, as the program last scored them (Token Recycling, arXiv 2408.08696)."""

    kind: Literal["recycle"] = "recycle"
    ranks: Annotated[int, Field(ge=1, le=8)] = 8
    """candidates behind each token"""
    remember: bool = True
    """whether the table outlives a sequence"""


class CopyDrafter(Choice):
    """What followed the last tokens where they occurred before (CopySpec, arXiv 2502.08923)."""

    kind: Literal["copy"] = "copy"
    match: Annotated[int, Field(ge=1, le=64)] = 3
    """tokens that must occur again"""
    length: Length = 10
    """tokens copied at most"""
    occurrence: Literal["first", "last"] = "first"
    """which earlier occurrence is copied from"""
    fallback: RecycleDrafter | None = None
    """who drafts where nothing occurs again; none decodes plainly there"""


class SkipDrafter(Choice):
    """The program without some sub-layers, searched for while it decodes (SWIFT, arXiv 2410.06916)."""

    kind: Literal["skip"] = "skip"
    skip: Share = 0.45
    """share of the sub-layers between the first and the last block that the draft does without"""
    length: Length = 25
    """tokens drafted at most"""
    stop: Probability = 0.8
    """a token less likely than this is the draft's last"""
    leaves: bool = True
    """whether next best tokens stand beside each drafted one"""
    context: Annotated[int, Field(ge=1, le=4096)] = 32
    """decoded tokens on which sets of sub-layers are compared"""
    interval: Annotated[int, Field(ge=1)] = 1
    """steps from one trial to the next"""
    enough: Probability = 0.95
    """share of right tokens at which the search ends"""
    patience: Annotated[int, Field(ge=0)] = 300
    """trials without gain after which it ends"""


class ExitDrafter(Choice):
    """An early exit with an adapter, which insert_exit adds (Kangaroo, arXiv 2404.18911)."""

    kind: Literal["exit"] = "exit"
    length: Length = 6
    """tokens drafted at most"""
    stop: Probability = 0.6
    """a token less likely than this is the draft's last"""


class HeadsDrafter(Choice):
    """Heads that insert_heads adds (Medusa, arXiv 2401.10774; Hydra, arXiv 2402.05109)."""

    kind: Literal["heads"] = "heads"
    ranks: Annotated[int, Field(ge=1, le=64)] = 8
    """candidates of a head behind one node"""
    width: Annotated[int, Field(ge=1, le=64)] = 4
    """nodes of a level that heads which read their path go on from"""


class SampledDrafter(Choice):
    """A tree drawn without replacement from the program without some sub-layers (RSD, arXiv 2402.14160)."""

    kind: Literal["sampled"] = "sampled"
    mode: Literal["constant", "beam"] = "constant"
    """draw `branching` children of every node, or keep that many of a level by stochastic beam search"""
    branching: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=16)] = (2, 2)
    """children of a node, or nodes of a level, level by level"""
    skip: Share = 0.45
    """share of the sub-layers between the first and the last block that the draft does without"""


Drafter = Annotated[
    CopyDrafter | RecycleDrafter | SkipDrafter | ExitDrafter | HeadsDrafter | SampledDrafter,
    Field(discriminator="kind"),
    Shorthand("kind"),
]


class Drafting(Strict):
    """How a program decodes speculatively."""

    drafter: Drafter
    rows: Annotated[tuple[Annotated[int, Field(ge=2, le=256)], ...], Field(min_length=1, max_length=8)] = (2, 4, 8)
    """tokens that a step may verify, the decided one included: the number is chosen by measured tokens a second, plain
    decoding among the choices, unless `adapt` is off; then it is the largest"""
    adapt: bool = True
    """whether the number of rows follows what was measured"""
    accept: Literal["exact", "typical"] = "exact"
    """`exact` keeps the tokens (greedy) or the law (sampling) of plain decoding; `typical` is lossy at temperatures
    above 0 (Medusa, arXiv 2401.10774)"""

    def to_json(self) -> dict[str, Any]:
        """Plain data from which `model_validate` makes it again."""
        return self.model_dump(mode="json")
