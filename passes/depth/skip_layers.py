"""Fewer layers: whole blocks, or only their attention or feed-forward, are taken out of the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from graphopt.diagnostics import PlanError
from graphopt.passes.depth.formula import evenly, reserved
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact
from graphopt.spec.scalars import ScalarError
from graphopt.spec.selectors import Layers

if TYPE_CHECKING:
    from torch import fx

    from graphopt.observe import Tap
    from graphopt.passkit.edits import Decline, Plan
    from graphopt.views import Block, SubLayer


class SkipLayers(Pass):
    """Take layers out: the residual stream passes them by, and their weights go.

    Say which in one of three ways. `layers` names them. `speedup` keeps max(2, int(L / speedup)) of all L layers,
    spread from the first to the last ("A Unified Layer Skipping Strategy", arXiv 2404.06954; there layers are skipped
    at each decoded token but not in the prompt, here they are gone). `remove` takes out so many of the layers that
    `where` selects: by `block_influence` those that turn the stream least, 1 - cos(input, output) over the calibration
    text (ShortGPT, arXiv 2403.03853; Minitron, arXiv 2407.14679), `evenly`, or the `last` ones. `part` takes out only
    the attention or the feed-forward of each, as in EvoPress (arXiv 2410.14649). Where layers share their weights
    fewer of them run, and the weights stay.

    ```yaml
    - use: skip_layers
      remove: 2
      choose: block_influence
    ```
    """

    name: ClassVar[str] = "skip_layers"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})

    layers: Layers | None = None
    """the layers to take out"""
    speedup: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] | None = None
    """how many times fewer layers shall run"""
    remove: Annotated[int, Field(ge=1)] | None = None
    """how many layers to take out"""
    choose: Literal["block_influence", "evenly", "last"] = "block_influence"
    """which layers `remove` takes out"""
    spacing: Literal["upstream", "linspace"] = "upstream"
    """how `speedup` spreads the layers that stay: in equal steps with an uneven last one, or as evenly as can be"""
    part: Literal["block", "attention", "feed_forward"] = "block"
    """what of each layer goes"""

    @model_validator(mode="after")
    def _one_way(self) -> SkipLayers:
        given = [field for field in ("layers", "speedup", "remove") if getattr(self, field) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise ScalarError.about(
                "which_layers",
                f"skip_layers takes exactly one of layers, speedup and remove, not {said}",
                help=("write layers: [3, 5..7], speedup: 1.25 or remove: 2",),
            )
        for field, owner in (("choose", "remove"), ("spacing", "speedup")):
            if field in self.model_fields_set and owner not in given:
                raise ScalarError.about("which_layers", f"skip_layers reads {field} only with {owner}")
        return self

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Layers go as they are."""
        return "none"

    def observe(self, context: Context) -> tuple[Tap, ...]:
        """Cosines of the stream before and after each candidate, when they decide."""
        from graphopt.observe import Tap

        if self.remove is None or self.choose != "block_influence":
            return ()
        ends = [self._ends(block) for block in self._candidates(context) if self._unfit(block) is None]
        return tuple(Tap(exit.name, "cosine", other=entry.name) for entry, exit in ends)

    def plan(self, context: Context) -> Plan:
        """An edit for each layer that goes, a decline for each that stays."""
        from graphopt.passkit.edits import Decline, Edit, Plan, Skip

        blocks = context.views.blocks
        if not blocks:
            return Plan((), (Decline("model", "no repeated residual structure was found, so there are no layers"),))
        candidates = self._candidates(context)
        declines = [Decline(block.path, "outside where") for block in blocks if block not in candidates]
        for block in candidates:
            reason = self._unfit(block)
            if reason is not None:
                declines.append(Decline(block.path, reason))
        fit = [block for block in candidates if self._unfit(block) is None]
        if not fit:
            return Plan((), tuple(declines))
        why, influences = self._chosen(context, fit)
        edits: list[Edit] = []
        for block in fit:
            if block.index in why:
                edits.append(Skip(block.path, block.index, self._parts(block), why[block.index]))
            else:
                declines.append(self._kept(block, influences))
        if len(edits) == len(blocks) and self.part == "block":
            raise PlanError.of(
                "no_layers_left",
                f"skip_layers would take out all {len(blocks)} layers",
                help=("leave at least one layer",),
            )
        notes = {} if not influences else {"influence": {str(index): value for index, value in influences.items()}}
        return Plan(tuple(edits), tuple(declines), notes)

    def _kept(self, block: Block, influences: dict[int, float]) -> Decline:
        from graphopt.passkit.edits import Decline

        if self.layers is not None:
            return Decline(block.path, "not among layers")
        if self.speedup is not None:
            return Decline(block.path, f"runs at speedup {self.speedup:g}")
        if block.index in influences:
            return Decline(block.path, f"influence {influences[block.index]:.4g} is not among the {self.remove} lowest")
        return Decline(block.path, f"not among the {self.remove} chosen {self.choose}")

    def _candidates(self, context: Context) -> list[Block]:
        return [block for block in context.views.blocks if context.covers(block.index, block.path)]

    def _parts(self, block: Block) -> tuple[int, ...]:
        if self.part == "block":
            return ()
        return tuple(i for i, sublayer in enumerate(block.sublayers) if sublayer.kind == self.part)

    def _unfit(self, block: Block) -> str | None:
        """Why this part cannot be taken out of a block."""
        if self.part == "block" or self._parts(block):
            parts = self._parts(block) or tuple(range(len(block.sublayers)))
            return _kept_by_others(tuple(block.sublayers[i] for i in parts))
        kinds = ", ".join(sublayer.kind for sublayer in block.sublayers)
        if any(sublayer.kind == "parallel" for sublayer in block.sublayers):
            return "attention and feed-forward run side by side in one sub-layer; only part: block can be taken out"
        return f"it has no sub-layer of kind {self.part} (it has {kinds})"

    def _ends(self, block: Block) -> tuple[fx.Node, fx.Node]:
        parts = self._parts(block) or tuple(range(len(block.sublayers)))
        return block.sublayers[parts[0]].entry, block.sublayers[parts[-1]].exit

    def _chosen(self, context: Context, fit: list[Block]) -> tuple[dict[int, str], dict[int, float]]:
        """Why each layer goes, by index, and the influences that were measured."""
        total = len(context.views.blocks)
        if self.layers is not None:
            return dict.fromkeys(self.layers.resolve(total), "named"), {}
        if self.speedup is not None:
            kept = self._reserved(total)
            return {i: f"speedup {self.speedup:g}" for i in range(total) if i not in kept}, {}
        assert self.remove is not None
        if self.remove > len(fit) or (self.part == "block" and self.remove >= total):
            raise PlanError.of(
                "too_few_layers",
                f"skip_layers cannot take {self.remove} of {len(fit)} layers out",
                notes=(f"the model has {total} layers, of which where and part leave {len(fit)}",),
                help=(f"remove at most {min(len(fit), total - 1 if self.part == 'block' else total)}",),
            )
        if self.choose == "last":
            return {block.index: "last" for block in fit[-self.remove :]}, {}
        if self.choose == "evenly":
            if self.remove > len(fit) - 2:
                raise PlanError.of(
                    "too_few_layers",
                    f"skip_layers cannot spread {self.remove} over {len(fit)} layers, of which the first and last stay",
                    help=("use choose: last or choose: block_influence",),
                )
            return {fit[i].index: "evenly" for i in evenly(len(fit), self.remove)}, {}
        influences = self._influences(context, fit)
        lowest = sorted(influences, key=lambda index: (influences[index], index))[: self.remove]
        return {index: f"influence {influences[index]:.4g}" for index in lowest}, influences

    def _reserved(self, total: int) -> tuple[int, ...]:
        assert self.speedup is not None
        try:
            return reserved(total, self.speedup, self.spacing)
        except ValueError:
            raise PlanError.of(
                "too_few_layers",
                f"skip_layers cannot make {total} layers {self.speedup:g} times faster",
                notes=(f"int({total} / {self.speedup:g}) is {int(total / self.speedup)}, and the first and last stay",),
                help=(f"use a speedup of at most {total / 2:g}, or spacing: linspace",),
            ) from None

    def _influences(self, context: Context, fit: list[Block]) -> dict[int, float]:
        if context.statistics is None:
            raise PlanError.of(
                "no_calibration",
                "skip_layers with choose: block_influence needs calibration text",
                help=("add calibration: {data: FILE, samples: 64, seq: 256}, or use choose: evenly",),
            )
        found = {}
        for block in fit:
            entry, exit = self._ends(block)
            found[block.index] = 1 - context.statistics.cosine(exit.name, entry.name).mean
        return found


def _kept_by_others(parts: tuple[SubLayer, ...]) -> str | None:
    """Why sub-layers would stay although the stream passes them by: others read what they make on the way."""
    from torch import SymInt

    from graphopt.views.trace import reachable

    inside, ends = {node for part in parts for node in part.nodes}, {part.exit for part in parts}

    def onward(node: fx.Node) -> list[fx.Node]:
        return [
            user for user in node.users if user not in inside and not isinstance(user.meta.get("val"), int | SymInt)
        ]

    for part in parts:
        for node in part.nodes:
            if node not in ends and any(found.op == "output" for found in reachable(onward(node), onward)):
                return f"other layers read %{node.name} of it, so that it would have to stay"
    return None
