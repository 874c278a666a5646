"""The laws that every pass is held to: `law(config, program)` returns, raises LawBroken, or Refused (nothing to judge).

Each takes a configuration and a program, plans with random-token calibration where the pass asks for it, and checks one
promise. Comparisons are in float64, where surgery and emulation differ by the order of sums alone.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from graphopt.artifact import load, save
from graphopt.compiler import verify
from graphopt.cost import cost
from graphopt.diagnostics import GraphoptError, VerifyError
from graphopt.ir.program import Program
from graphopt.ir.purity import is_pure
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.run import Runner, runnable
from graphopt.ir.shapes import propagate
from graphopt.ir.text import fingerprint
from graphopt.passkit import Decline, Edit, Effect, Pass, Skip
from graphopt.spec import parse_spec
from graphopt.testing import decoding
from graphopt.testing.trial import SHAPES, LawBroken, Refused, Trial, given, trial
from graphopt.views import Views

Law = Callable[[Pass, Program], None]
Check = Callable[[Trial], None]
LAWS: dict[str, Law] = {}


def _law(check: Check) -> Law:
    """Register a check under its name; whatever a pass raises that is no refusal breaks the law that was asked."""
    name = check.__name__

    @wraps(check)
    def law(config: Pass, program: Program) -> None:
        try:
            check(trial(config, program))
        except (LawBroken, Refused):
            raise
        except Exception as error:
            reason = error.diagnostics[0].message if isinstance(error, GraphoptError) else str(error)
            raise LawBroken(name, f"{type(error).__name__}: {reason}") from error

    del law.__wrapped__  # type: ignore[attr-defined]
    LAWS[name] = law
    return law


def _require(holds: object, law: str, message: str) -> None:
    if not holds:
        raise LawBroken(law, message)


@_law
def plan_is_pure(case: Trial) -> None:
    """A plan changes nothing, and the same question gets the same answer."""
    before = fingerprint(case.program)
    weights = dict(case.program.weights.weights)
    plans = [case.plan_on(case.context), case.plan_on(case.context)]
    plans.append(case.plan_on(case.context_of(Views(case.program))))
    _require(fingerprint(case.program) == before, "plan_is_pure", "planning changed the graph")
    same = all(case.program.weights[name] is weight for name, weight in weights.items())
    _require(same, "plan_is_pure", "planning changed weights")
    first, *others = [
        ([edit.to_json() for edit in plan.edits], [decline.to_json() for decline in plan.declines]) for plan in plans
    ]
    _require(all(other == first for other in others), "plan_is_pure", "planning again gave another plan")


@_law
def plan_is_complete(case: Trial) -> None:
    """Every view of the kind that a plan is about gets an edit or a decline with a reason, and not both."""
    law, plan, views = "plan_is_complete", case.plan, case.views
    edited = [edit.candidate for edit in plan.edits]
    declined = [decline.candidate for decline in plan.declines]
    _require(edited or declined, law, "the plan is empty: neither an edit nor a decline (a silent no-op)")
    for decline in plan.declines:
        _require(decline.reason.strip(), law, f"{decline.candidate} is declined without a reason")
    both = sorted(set(edited) & set(declined))
    _require(not both, law, f"{', '.join(both)} is edited and declined")
    answered = {name.split(":")[0] for name in (*edited, *declined)}
    kinds = {
        "block": {block.path for block in views.blocks},
        "attention": {attention.path for attention in views.attentions},
        "feed-forward": {feed_forward.path for feed_forward in views.feed_forwards},
        "experts": {bank.path for bank in views.experts},
    }
    for kind, paths in kinds.items():
        missing = sorted(paths - answered) if paths & answered else []
        _require(not missing, law, f"no word about {kind} {', '.join(missing)}")


@_law
def edits_are_data(case: Trial) -> None:
    """Edits and declines are JSON that reads back equal, each with a candidate and one line for people."""
    items: tuple[Edit | Decline, ...] = (*case.plan.edits, *case.plan.declines)
    for item in items:
        data = item.to_json()
        read = json.loads(json.dumps(data, allow_nan=False))
        _require(read == data, "edits_are_data", f"{item.candidate}: {data} reads back as {read}")
        _require(item.candidate, "edits_are_data", f"{data} names no candidate")
    for edit in case.plan.edits:
        line = edit.describe()
        _require(line.strip() and "\n" not in line, "edits_are_data", f"{edit.candidate}: {line!r} is no single line")


@_law
def surgery_equals_emulation(case: Trial) -> None:
    """The cut program computes what the uncut one does when the same change is made by masks and maps."""
    if case.plan.edits:
        _agree("surgery_equals_emulation", case.after, case.emulated, allowed(case))


@_law
def exact_means_exact(case: Trial) -> None:
    """A pass that says `exact` leaves the function as it was; any other may change it, and a plan without edits may not."""
    if case.config.effect == Effect.EXACT or not case.plan.edits:
        _agree("exact_means_exact", case.after, case.program, allowed(case))


@_law
def verification_can_fail(case: Trial) -> None:
    """A result that is off by a billionth is refused: what verification allows is rounding alone."""
    if not case.plan.edits:
        return
    rewriter = Rewriter(case.after)
    node = rewriter.node(case.after.output_nodes[0])
    scaled = rewriter.call(torch.ops.aten.mul.Tensor, node, 1 + 1e-9, after=node)
    rewriter.replace(node, scaled, keep=lambda user: user is scaled)
    try:
        effect = case.config.effect
        verify.verify(case.program, rewriter.finish(), case.plan, effect, "full", None, case.config.name)
    except VerifyError:
        return
    raise LawBroken("verification_can_fail", "a result that is wrong by 1e-9 was certified")


@_law
def runs_at_other_shapes(case: Trial) -> None:
    """The result runs in its own dtype at sizes that were not captured, batch 1 and length 1 among them."""
    ours, theirs = case.after.module(None), case.program.module(None)
    for seed, sizes in enumerate(SHAPES):
        inputs = given(case.program, sizes, seed)
        with torch.no_grad():
            # A pass may add results behind those that there were.
            for got, expected in zip(ours(**inputs), theirs(**inputs), strict=False):
                same = got.shape == expected.shape and got.dtype == expected.dtype
                _require(same, "runs_at_other_shapes", f"{got.dtype}{list(got.shape)} at {sizes}")
                finite = bool(torch.isfinite(got).all()) or not bool(torch.isfinite(expected).all())
                _require(finite, "runs_at_other_shapes", f"NaN or infinity at {sizes}")


@_law
def second_run_is_declared(case: Trial) -> None:
    """After an idempotent pass a second run finds nothing; after any other it plans, declines or refuses in words."""
    again = Trial(case.config, case.after)
    try:
        plan = again.plan
    except Refused:
        _require(not case.config.idempotent, "second_run_is_declared", "idempotent, but the second run is refused")
        return
    if case.config.idempotent:
        lines = "; ".join(edit.describe() for edit in plan.edits)
        _require(not plan.edits, "second_run_is_declared", f"idempotent, but the second run would: {lines}")
    plan_is_complete(case.config, case.after)


@_law
def nothing_left_behind(case: Trial) -> None:
    """Nothing of what was removed stays: no node or weight that nobody reads, no shape but what propagation says."""
    law, after = "nothing_left_behind", case.after
    for edit in case.plan.edits:
        if isinstance(edit, Skip):
            sublayers = case.views.blocks[edit.index].sublayers
            gone = {n.name for i in edit.parts or range(len(sublayers)) for n in sublayers[i].nodes}
            stays = sorted(gone & set(after.nodes))
            _require(not stays, law, f"{edit.candidate} is skipped, but %{', %'.join(stays)} of it stay")
    read = set()
    for node in after.graph.graph.nodes:
        if node.op == "placeholder" and "weight" in node.meta:
            read.add(node.meta["weight"])
            _require(node.users, law, f"weight {node.meta['weight']} has no reader")
        elif is_pure(node):
            _require(node.users, law, f"%{node.name} = {node.target} has no reader")
        _require(node.op == "output" or "val" in node.meta, law, f"%{node.name} has no shape")
    _require(read == set(after.weights), law, f"weights and readers differ: {sorted(read ^ set(after.weights))}")
    told = {node.name: _shape(node) for node in after.graph.graph.nodes}
    fresh = Rewriter(after)
    fresh.graph.lint()
    copy = fx.GraphModule(torch.nn.Module(), fresh.graph)
    propagate(copy, after.weights, after.dims, after.entry)
    for old, new in zip(after.graph.graph.nodes, copy.graph.nodes, strict=True):
        _require(_rank(old) == _rank(new), law, f"%{old.name} is {told[old.name]}, but says {_shape(new)}")


@_law
def ties_stay_ties(case: Trial) -> None:
    """A tensor under two names stays one tensor with both."""
    for name, weight in case.program.weights.weights.items():
        if not weight.aliases or name not in case.after.weights:
            continue
        kept = case.after.weights[name].aliases
        _require(kept == weight.aliases, "ties_stay_ties", f"{name} was tied to {weight.aliases}, now to {kept}")
        copies = [alias for alias in weight.aliases if alias in case.after.weights]
        _require(not copies, "ties_stay_ties", f"{name} and {', '.join(copies)} are two tensors now")


@_law
def cost_is_counted(case: Trial) -> None:
    """Counted FLOPs equal what torch counts as it runs, parameters and bytes those of the real tensors."""
    law, after = "cost_is_counted", case.after
    found = cost(after)
    _require(not found.uncounted, law, f"no formula for {dict(found.uncounted)}")
    tensors = {name: after.weights.evaluate(name) for name in after.weights}
    kinds = {name: after.weights[name].kind for name in tensors}
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if kinds[name] == "parameter")
    _require(found.parameters == parameters, law, f"{found.parameters} parameters counted, {parameters} there")
    size = sum(tensor.nbytes for name, tensor in tensors.items() if kinds[name] != "constant")
    _require(found.bytes == size, law, f"{found.bytes} bytes counted, {size} there")
    runner = Runner(after, None, "cpu")
    # All choices of a routing: those that a token drops are not computed otherwise.
    runner.graph = runnable(after, after.dtype, "cpu")
    for seed, sizes in enumerate(SHAPES[1:]):
        inputs = given(after, sizes, seed)
        mode = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        with torch.no_grad(), mode:
            runner(**inputs)
        at = {**sizes, **verify.with_pictures(after, sizes)}
        counted = found.at(**verify.capacity_of(after, at), **at)["flops"]
        _require(
            counted == mode.get_total_flops(), law, f"{counted} FLOPs counted, {mode.get_total_flops()} at {sizes}"
        )


@_law
def save_and_load_keep_bits(case: Trial) -> None:
    """A saved result loads with the same fingerprint and gives the same bits."""
    with tempfile.TemporaryDirectory() as directory:
        save(case.after, Path(directory) / "saved", format="graphopt")
        loaded = load(Path(directory) / "saved")
        _require(fingerprint(loaded) == fingerprint(case.after), "save_and_load_keep_bits", "another fingerprint")
        ours, theirs = loaded.module(None), case.after.module(None)
        inputs = given(case.program, SHAPES[1], 0)
        with torch.no_grad():
            for got, expected in zip(ours(**inputs), theirs(**inputs), strict=True):
                _require(same_bits(got, expected), "save_and_load_keep_bits", "another result")


@_law
def yaml_round_trip(case: Trial) -> None:
    """A step written to YAML reads back as the same configuration."""
    step = case.config.to_yaml()
    text = json.dumps({"graphopt": 1, "steps": [step]})
    loaded = parse_spec(text, registry=_Only(type(case.config)))
    read = loaded.steps[0].config
    _require(read == case.config, "yaml_round_trip", f"{step} reads back as {read!r}")


@_law
def input_is_untouched(case: Trial) -> None:
    """Planning, cutting and emulating leave the given program and its tensors as they were."""
    before = fingerprint(case.program)
    tensors = {name: case.program.weights.evaluate(name).clone() for name in case.program.weights}
    fresh = Trial(case.config, case.program)
    if fresh.plan.edits:
        fresh.after.module(None)(**given(case.program, SHAPES[1], 0))
        fresh.emulated.module(torch.float64)
    changed = [name for name in tensors if not same_bits(tensors[name], case.program.weights.evaluate(name))]
    _require(not changed, "input_is_untouched", f"the pass wrote into {', '.join(changed)}")
    _require(fingerprint(case.program) == before, "input_is_untouched", "the given graph changed")


@_law
def gradients_flow(case: Trial) -> None:
    """Every parameter of the result that had a gradient before can still be trained."""
    before, after = _gradients(case.program), _gradients(case.after)
    lost = sorted(name for name, has in after.items() if not has and before.get(name, True))
    _require(not lost, "gradients_flow", f"no gradient reaches {', '.join(lost)}")


@_law
def generation_is_kept(case: Trial) -> None:
    """The result generates with a cache what it generates without, cache length included, or cannot have a cache."""
    if decoding.is_cached(case.program):
        return
    if decoding.is_cached(case.after):
        decoding.compare(case.after, case.program, allowed(case))
        return
    cached = decoding.with_cache(case.after)
    if cached is not None:
        decoding.compare(cached, case.after, allowed(case))


def composes_or_is_refused(first: Pass, second: Pass, program: Program) -> None:
    """Two passes in a row: the second keeps all comparisons on what the first left, or refuses in words."""
    law = "composes_or_is_refused"
    if second.forbids & first.adds or second.needs & first.drops:
        return
    result = trial(first, program).after
    for name in ("plan_is_complete", "surgery_equals_emulation", "runs_at_other_shapes", "nothing_left_behind"):
        try:
            LAWS[name](second, result)
        except LawBroken as error:
            raise LawBroken(law, f"{second.name} after {first.name} breaks {error}") from error


def allowed(case: Trial) -> float:
    """The relative error that verification allows in float64 on a program."""
    longest = max(max(weight.expr.shape, default=1) for weight in case.program.weights.weights.values())
    return verify.tolerance(torch.float64, longest * max(1, len(case.views.blocks)))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes under the same shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    mine, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return bool(torch.equal(mine, other))


def _agree(law: str, got: Program, expected: Program, bound: float) -> None:
    ours, theirs = got.module(torch.float64), expected.module(torch.float64)
    for seed, sizes in enumerate(SHAPES):
        inputs = verify.random_inputs(expected, sizes, seed)
        with torch.no_grad():
            for mine, other in zip(ours(**inputs), theirs(**inputs), strict=True):
                _require(
                    mine.shape == other.shape, law, f"{list(mine.shape)} instead of {list(other.shape)} at {sizes}"
                )
                scale = max(float(other.abs().max()), torch.finfo(torch.float64).tiny)
                error = float((mine - other).abs().max()) / scale
                _require(error <= bound, law, f"off by {error:.3g} at {sizes}, {bound:.3g} is allowed")


def _gradients(program: Program) -> dict[str, bool]:
    runner: Any = program.module(torch.float64)
    names = [node.meta["weight"] for node in program.graph.graph.nodes if "weight" in node.meta]
    leaves = {}
    for position, name in enumerate(names):
        if program.weights[name].kind == "parameter":
            leaves[name] = runner.values[position] = runner.values[position].detach().clone().requires_grad_()
    results = runner(**verify.random_inputs(program, SHAPES[1], 0))
    total = torch.stack([result.square().sum() for result in results if result.dtype.is_floating_point]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: gradient is not None for name, gradient in zip(leaves, found, strict=True)}


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _rank(node: fx.Node) -> tuple[Any, ...]:
    """Dtype and sizes, symbolic ones alike: two propagations name their symbols apart."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return (value.dtype, *(size if isinstance(size, int) else "symbolic" for size in value.shape))


def _attention_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _cached_flops(
    q: Any, k: Any, v: Any, keys: Any, values: Any, *rest: Any, out_shape: Any = None, **given: Any
) -> int:
    return int(sdpa_flop_count(q, keys, values))


def _held_flops(q: Any, k: Any, v: Any, keys: Any, values: Any, *rest: Any, out_shape: Any = None, **given: Any) -> int:
    # What the counter hands over are sizes.
    both = [(*new[:2], new[2] + old[2], new[3]) for new, old in ((k, keys), (v, values))]
    whole = int(sdpa_flop_count(q, *both))
    known = rest[3] is not None
    return whole * v[3] // (q[3] + v[3]) if known else whole


def _admitting_flops(
    q: Any, k: Any, v: Any, keys: Any, values: Any, *rest: Any, out_shape: Any = None, **g: Any
) -> int:
    both = [(*new[:2], new[2] + old[2], new[3]) for new, old in ((k, keys), (v, values))]
    return int(sdpa_flop_count(q, *both))


def _packed_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **given: Any) -> int:
    tokens = rest[5][2] * rest[15] + k[2]
    return int(sdpa_flop_count(q, (*k[:2], tokens, k[3]), (*v[:2], tokens, v[3])))


def _weight_flops(q: Any, k: Any, keys: Any, *rest: Any, out_shape: Any = None, **given: Any) -> int:
    return int(2 * math.prod(q) * (k[2] + keys[2]))


def _received_flops(q: Any, k: Any, *rest: Any, out_shape: Any = None, **given: Any) -> int:
    return int(2 * q.numel() * k[2])


def _merged_flops(x: Any, *rest: Any, out_shape: Any = None, **given: Any) -> int:
    return int(2 * x.numel() * x[1])


_FLOPS = {
    torch.ops.graphopt.received_attention: _received_flops,
    torch.ops.graphopt.merge_tokens: _merged_flops,
    torch.ops.graphopt.pair_scores: _merged_flops,
    torch.ops.graphopt.admitted_attention: _attention_flops,
    torch.ops.graphopt.admitting_attention: _admitting_flops,
    torch.ops.graphopt.attention: _attention_flops,
    torch.ops.graphopt.bounded_attention: _attention_flops,
    torch.ops.graphopt.held_attention: _held_flops,
    torch.ops.graphopt.packed_attention: _packed_flops,
    torch.ops.graphopt.quantised_attention: _attention_flops,
    torch.ops.graphopt.heavy_weights: _weight_flops,
    torch.ops.graphopt.cached_attention: _cached_flops,
}


class _Only:
    """A registry of one pass."""

    def __init__(self, pass_class: type[Pass]) -> None:
        self.table: Mapping[str, type[Pass]] = {pass_class.name: pass_class}

    def names(self) -> list[str]:
        """Its name."""
        return list(self.table)

    def get(self, name: str, /) -> type[Pass]:
        """The pass."""
        return self.table[name]
