"""What Hypothesis draws: shapes of models, programs, inputs, and pipelines of passes.

Every choice lists the plainest value first, because that is what shrinking ends at.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from hypothesis import assume
from hypothesis import strategies as st

from graphopt.compiler.resolve import resolve
from graphopt.compiler.verify import random_inputs
from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.passkit import Pass, PassRegistry
from graphopt.spec import parse_spec
from graphopt.testing.configurations import configurations
from graphopt.testing.models import ACTIVATIONS, LONGEST, ROTARY, Shape, build

_KINDS = get_type_hints(Shape)
# Larger than any head or layer that the sizes below can make, and odd sizes are as likely as even ones.
SIZES = {
    "layers": (1, 3),
    "head_dim": (2, 8),
    "hidden": (2, 20),
    "neurons": (2, 16),
    "vocabulary": (3, 24),
}
FLAGS = ("tied", "gated", "packed_qkv", "packed_gate_up", "biases", "qk_norm")
CHOICES = {name: get_args(_KINDS[name]) for name in ("norm", "place", "positions", "dtype")}
# Decoders are most of what people transform, and the other kinds share their layers.
KINDS = ("decoder", "decoder", "encoder_decoder", "vision")
EXPERTS = (0, 0, 2, 3)
MOST_PER_GROUP = 3
WINDOWS = (None, 1, 3, 8)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Shapes over the whole structural space; they shrink towards one layer of one head, smallest and plainest."""
    values: dict[str, Any] = {name: draw(st.integers(*bounds)) for name, bounds in SIZES.items()}
    values["kv_heads"] = draw(st.integers(1, MOST_PER_GROUP))
    values["heads"] = values["kv_heads"] * draw(st.integers(1, MOST_PER_GROUP))
    values |= {name: draw(st.booleans()) for name in FLAGS}
    values |= {name: draw(st.sampled_from(options)) for name, options in CHOICES.items()}
    values["kind"] = draw(st.sampled_from(KINDS))
    values["experts"] = draw(st.sampled_from(EXPERTS))
    values["chosen"] = draw(st.integers(1, max(1, values["experts"])))
    values["window"] = draw(st.sampled_from(WINDOWS))
    values["activation"] = draw(st.sampled_from(list(ACTIVATIONS)))
    values["causal"] = not draw(st.booleans())
    return legal(values)


def legal(values: dict[str, Any]) -> Shape:
    """The nearest shape that a model can have: options that need another one are dropped with it."""
    values = dict(values)
    values["packed_gate_up"] = values["packed_gate_up"] and values["gated"]
    if values["positions"] == "partial":
        values["head_dim"] = max(4, values["head_dim"])
    if values["positions"] in ROTARY:
        values["head_dim"] += values["head_dim"] % 2
    if values.get("experts"):
        values["packed_gate_up"] = False
    if values.get("kind") == "vision":
        values |= {"tied": False, "causal": False}
    return Shape(**values)


def covering(count: int = 16, seed: int = 0) -> tuple[Shape, ...]:
    """A fixed list of varied shapes, the plainest first, for tests that must not capture a new model per example."""
    random_ = random.Random(seed)
    found = [Shape(layers=2, heads=2, kv_heads=2, head_dim=4, hidden=6, neurons=5)]
    for i in range(1, count):
        values: dict[str, Any] = {name: random_.randint(*bounds) for name, bounds in SIZES.items()}
        values["layers"] = 1 + i % 3
        values["kv_heads"] = 1 + random_.randrange(MOST_PER_GROUP)
        values["heads"] = values["kv_heads"] * (1 + i % MOST_PER_GROUP)
        values |= {name: bool((i >> random_.randrange(4)) % 2) for name in FLAGS}
        values |= {name: options[(2 * i + i // 5) % len(options)] for name, options in CHOICES.items()}
        values["place"] = CHOICES["place"][i % 4]
        # Half of all models have the norm that can be folded, so that narrower streams are tried too.
        values["norm"] = CHOICES["norm"][int(i % 5 > 2)]
        values["window"] = random_.choice(WINDOWS)
        values["activation"] = list(ACTIVATIONS)[i % len(ACTIVATIONS)]
        values["causal"] = i % 4 != 3
        values["kind"] = {3: "vision", 6: "encoder_decoder"}.get(i % 8, "decoder")
        values["experts"], values["chosen"] = (3, 2) if i % 8 == 5 else (0, 1)
        found.append(legal(values))
    return tuple(found)


def shapes_of(pool: Sequence[Shape] | None) -> st.SearchStrategy[Shape]:
    """Shapes from a pool, or free ones when there is none."""
    return shapes() if pool is None else st.sampled_from(list(pool))


@st.composite
def programs(draw: st.DrawFn, pool: Sequence[Shape] | None = None) -> Program:
    """Captured models of drawn shapes, of a pool's when one is given."""
    return build(draw(shapes_of(pool)))


@st.composite
def inputs(draw: st.DrawFn, program: Program) -> dict[str, torch.Tensor]:
    """Inputs at sizes that were not captured; they shrink towards batch 1 and length 1."""
    captured = {dim.name: dim.hint for dim in program.dims}
    bounds = {"B": 5, "S": min(40, LONGEST), "T": 12}
    sizes = {name: draw(st.integers(1, bounds.get(name, 8))) for name in captured}
    assume(sizes != captured)
    return random_inputs(program, sizes, draw(st.integers(0, 3)))


@dataclass(frozen=True)
class Pipeline:
    """A model and the steps to run on it."""

    shape: Shape
    steps: tuple[Pass, ...]

    @property
    def spec(self) -> str:
        """The steps as a spec."""
        return spec_of(self.steps)


def spec_of(steps: Sequence[Pass]) -> str:
    """A spec (JSON, which is YAML) of steps that may also find nothing to do."""
    return json.dumps({"graphopt": 1, "steps": [{**step.to_yaml(), "optional": True} for step in steps]}, indent=1)


@st.composite
def pipelines(draw: st.DrawFn, names: Sequence[str] | None = None, pool: Sequence[Shape] | None = None) -> Pipeline:
    """One to three registered passes in an order that facts allow, on a drawn model."""
    registry = PassRegistry()
    known = list(registry.names()) if names is None else list(names)
    shape = draw(shapes_of(pool))
    program = build(shape)
    chosen = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
    steps = tuple(draw(configurations(registry.get(name), program)) for name in chosen)
    loaded = parse_spec(spec_of(steps), registry=registry)
    try:
        resolve(loaded)
    except PlanError as error:
        assume(all(diagnostic.code == "no_calibration" for diagnostic in error.diagnostics))
    return Pipeline(shape, steps)
