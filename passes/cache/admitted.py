"""The edit that gives an attention to admitted tokens its buffers, which grow with what is admitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Dim, Input
from graphopt.ir.rewriter import Rewriter
from graphopt.passes.cache.slots import CAPACITY, Slot, Stage
from graphopt.views import Views

aten = torch.ops.aten
ops = torch.ops.graphopt
_SHARED = "admitted places"


@dataclass(frozen=True, eq=False)
class AdmittedSlot(Slot):
    """A slot that holds admitted tokens; slots whose tokens one predictor admits share the places of these."""

    @property
    def grows(self) -> bool:
        """Its buffers grow with what is admitted, and not with the text."""
        return False

    def describe(self) -> str:
        """What an entry holds."""
        return f"{super().describe()}, admitted tokens alone"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {**super().to_json(), "edit": "admitted_slot"}

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """The attention reads what was admitted and returns what is new."""
        stage = Stage.of(rewriter, views.program)
        stage.buffers(self)
        core = rewriter.node(self.node)
        q, k, v, _, sinks, scale, _, _, softcap, admit = core.args
        places, length = self._places(rewriter, stage, core, admit)  # type: ignore[arg-type]
        keys, values = (
            rewriter.add_input(
                Input(f"cache_{self.index}_held_{kind}", (stage.batch, heads, length, size), self.dtype, "cache")
            )
            for kind, (heads, size) in (("keys", self.keys), ("values", self.values))
        )
        made = rewriter.call(
            ops.admitting_attention.default,
            q, k, v, keys, values, places, stage.held_at(self.level)[2], admit, sinks, scale, softcap,
            before=core,
        )  # fmt: skip
        for name, node in (("keys", k), ("values", v)):
            rewriter.add_output(f"cache_{self.index}_new_{name}", node)  # type: ignore[arg-type]
        rewriter.replace(core, made)

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """As `apply`: that buffers hold what the mask shows is proven by decoding, not at random inputs."""
        self.apply(rewriter, views)

    def _places(self, rewriter: Rewriter, stage: Stage, core: fx.Node, admit: fx.Node) -> tuple[fx.Node, str]:
        """The input that says which tokens are held, and its dimension; made by the first slot of a predictor."""
        known: dict[fx.Node, tuple[fx.Node, str]] = rewriter.shared.setdefault(_SHARED, {})
        if admit not in known:
            length = f"{CAPACITY.name}A{len(known) + 1}"
            rewriter.add_dim(Dim(length, CAPACITY.low, CAPACITY.high, CAPACITY.hint))
            spec = Input(f"cache_{self.index}_held_places", (stage.batch, 1, length), torch.int64, "cache")
            known[admit] = rewriter.add_input(spec), length
            taken = rewriter.call(aten.gt.Scalar, admit, 0.5, before=core)
            if self.level:
                assert stage.prompt is not None
                real = stage.prompt.real[self.level - 1]
                taken = rewriter.call(aten.logical_and.default, taken, real, before=core)
            taken = rewriter.call(aten.to.dtype, taken, torch.int64, before=core)
            rewriter.add_output(f"cache_{self.index}_new_admit", taken)
        return known[admit]
