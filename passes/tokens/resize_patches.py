"""Patches of another size: a vision model reads the same pictures as fewer or more tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from graphopt.diagnostics import PlanError
from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact

if TYPE_CHECKING:
    from graphopt.passes.tokens.patches import Patches, Repatch
    from graphopt.passkit.edits import Plan


class ResizePatches(Pass):
    """Cut pictures into patches of another size, with the kernel of their embedding and the positions resampled.

    Pictures of I pixels a side become (I / patch)^2 tokens, so that patches of twice the size leave a quarter of
    them and smaller ones show more detail ("Scaling Laws in Patchification", arXiv 2502.03738, where models are
    trained at each size). `kernel: pseudo_inverse` gives the larger kernel whose products with enlarged patches are
    those of the old kernel with the patches as they were, exactly (FlexiViT, arXiv 2212.08013), and the closest one
    where patches shrink; `resize` enlarges or shrinks the kernel as if it were a picture. Positions that are added
    to the patches, learnt or constant, are resampled on the new grid; those of class tokens stay. A text that
    pictures are read into then holds as many placeholders a picture as there are patches, and results with an entry
    a patch follow. What comes out is close to the old model at best: quality is measured, and `recover` trains what
    is lost. Patches that are grouped on their grid (windows, merging) and weights with one entry a patch are
    declined. `where` has no say in it.

    ```yaml
    - use: resize_patches
      patch: 8
    ```
    """

    name: ClassVar[str] = "resize_patches"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED})
    idempotent: ClassVar[bool] = True

    patch: Annotated[int, Field(ge=1, le=4096)]
    """side of the new patches in pixels; it must divide the sides of the picture"""
    kernel: Literal["pseudo_inverse", "resize"] = "pseudo_inverse"
    """how the kernel of the embedding follows"""
    positions: Literal["bicubic", "bilinear"] = "bicubic"
    """how positions are resampled"""

    def reads(self) -> Literal["none", "rows", "whole"]:
        """Nothing but which positions are looked up."""
        return "none"

    def plan(self, context: Context) -> Plan:
        """An edit for each embedding of patches, a decline for every other convolution over pictures."""
        from graphopt.passes.tokens.patches import Unfit, convolutions, find_patches
        from graphopt.passkit.edits import Decline, Plan

        edits: list[Repatch] = []
        declines: list[Decline] = []
        for node in convolutions(context.program):
            path = str(node.meta.get("path") or node.name)
            try:
                edits.append(self._edit(context, find_patches(context.views, node)))
            except Unfit as reason:
                declines.append(Decline(path, str(reason)))
        if not edits and not declines:
            declines.append(Decline("model", "no convolution embeds patches of a picture"))
        return Plan(tuple(edits), tuple(declines))

    def _edit(self, context: Context, patches: Patches) -> Repatch:
        from graphopt.passes.tokens.patches import Repatch, Unfit

        if self.patch == patches.size:
            raise Unfit(f"its patches have {self.patch} pixels a side already")
        height, width = patches.picture
        if height % self.patch or width % self.patch:
            fits = [side for side in range(1, min(height, width) + 1) if height % side == 0 and width % side == 0]
            below = max(side for side in fits if side <= self.patch)
            raise PlanError.of(
                "patch_size",
                f"pictures of {height} x {width} pixels do not divide into patches of {self.patch}",
                notes=(
                    f"{patches.path}: patches of {patches.size} pixels a side today",
                    f"patches that fit: {', '.join(map(str, fits))}",
                ),
                help=(f"use patch: {below}",),
            )
        edit = Repatch(
            patches.path, patches.node.name, patches.size, self.patch, patches.picture, self.kernel, self.positions
        )
        edit.check(context.views)
        return edit
