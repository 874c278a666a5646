"""Differential testing of ops: any lowering of a graphopt op against the op's meaning, at odd shapes and in each dtype.

A contract says of an op what may be asked of it (`sample`) and what it means (`reference`, written from the definition
and run in float64). `check_lowering(op, kernel)` holds a kernel to both; the op's own eager kernel is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from graphopt.ops import attention, attention_mask, cached_attention, rms_norm, rotary

Arguments = tuple[Any, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Powers of two, their neighbours, and sizes that no tile divides.
LENGTHS = (1, 2, 3, 5, 8, 17, 33)
HEAD_SIZES = (2, 1, 3, 4, 8, 16)
# A lowering sums in another order than the eager kernel, which may happen to round better.
SLACK = 3.0
ROUNDINGS = 4.0
EXACT = 4096.0


class LoweringBroken(AssertionError):
    """A lowering does not compute what its op means."""


@dataclass(frozen=True)
class Sample:
    """Arguments of an op in its schema's order; `judged` is true where the result means something (None: everywhere)."""

    arguments: Arguments
    judged: torch.Tensor | None = None

    def __str__(self) -> str:
        return ", ".join(_said(value) for value in self.arguments)


@dataclass(frozen=True)
class Contract:
    """What may be asked of an op and what it means; `writes` are positions of arguments that it writes into.

    `reference` takes float64 arguments and returns what the op returns; into the arguments of `writes` it writes, too.
    """

    op: Any
    sample: Callable[[torch.dtype], st.SearchStrategy[Sample]]
    reference: Callable[..., torch.Tensor]
    writes: tuple[int, ...] = ()


def check_lowering(
    op: Any,
    implementation: Callable[..., torch.Tensor],
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    max_examples: int = 100,
    device: torch.device | str = "cpu",
    start: int = 0,
) -> int:
    """Hold an implementation of a graphopt op to the op's reference; returns the number of examples that were tried.

    `implementation` takes the op's arguments in order. Its error against the float64 reference may be a few times that
    of the op's eager kernel in the same dtype, or a few roundings (in float64 roundings alone). Dtype and shape must be
    the op's, and what an op writes into its arguments is compared, too. Raises LoweringBroken with the smallest sample,
    KeyError for an op without a contract.
    """
    contract = CONTRACTS[op]
    tried = 0
    for dtype in dtypes:

        @seed(start)
        @settings(
            max_examples=max_examples,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(contract.sample(dtype))
        def run(sample: Sample) -> None:
            nonlocal tried
            tried += 1
            _judge(contract, implementation, sample, torch.device(device))

        run()
    return tried


def _judge(
    contract: Contract, implementation: Callable[..., torch.Tensor], sample: Sample, device: torch.device
) -> None:
    """Compare one sample; raises LoweringBroken."""
    meant = _copied(sample.arguments, wide=True)
    wanted = [contract.reference(*meant), *(meant[i] for i in contract.writes)]
    plain = _copied(sample.arguments)
    eager = [contract.op(*plain), *(plain[i] for i in contract.writes)]
    mine = _copied(sample.arguments, device=device)
    try:
        got = [implementation(*mine), *(mine[i] for i in contract.writes)]
    except LoweringBroken:
        raise
    except Exception as raised:
        raise LoweringBroken(f"{type(raised).__name__}: {raised}\n  at {sample}") from raised
    for number, (ours, usual, true) in enumerate(zip(got, eager, wanted, strict=True)):
        what = "the result" if number == 0 else f"what is written into argument {contract.writes[number - 1]}"
        if not isinstance(ours, torch.Tensor) or ours.shape != true.shape or ours.dtype != usual.dtype:
            said = _said(ours)
            raise LoweringBroken(f"{what} is {said} and not {usual.dtype}{list(true.shape)}\n  at {sample}")
        judged = sample.judged if number == 0 else None
        error, allowed = _errors(ours.to("cpu"), usual, true, judged)
        if not error <= allowed:
            raise LoweringBroken(f"{what} is off by {error:.3g}, {allowed:.3g} is allowed\n  at {sample}")


def _errors(
    ours: torch.Tensor, usual: torch.Tensor, true: torch.Tensor, judged: torch.Tensor | None
) -> tuple[float, float]:
    """The largest absolute error and what rounding allows."""
    if judged is not None:
        keep = judged.expand(true.shape)
        ours, usual, true = ours[keep], usual[keep], true[keep]
    if not true.numel():
        return 0.0, 0.0
    if not ours.dtype.is_floating_point:
        return float((ours != true.to(ours.dtype)).any()), 0.0
    wide = true.to(torch.float64)
    error = float((ours.to(torch.float64) - wide).abs().max())
    rounding = torch.finfo(ours.dtype).eps * max(float(wide.abs().max()), torch.finfo(ours.dtype).tiny)
    if ours.dtype == torch.float64:
        # Here nobody's rounding excuses anything, the eager kernel's least of all.
        return error, EXACT * rounding
    known = float((usual.to(torch.float64) - wide).abs().max())
    return error, SLACK * known + ROUNDINGS * rounding


def _copied(arguments: Arguments, *, wide: bool = False, device: torch.device | None = None) -> list[Any]:
    """Private copies with their strides; in float64 for the reference."""
    made: list[Any] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            copy = value.detach().clone(memory_format=torch.preserve_format)
            copy = copy.to(torch.float64) if wide and value.dtype.is_floating_point else copy
            value = copy if device is None else copy.to(device)
        made.append(value)
    return made


def _said(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{strides}"


# --- what may be asked ---------------------------------------------------------------------------------------------


class _Numbers:
    """Random tensors of one sample, no two alike."""

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 7)))
        self.dtype = dtype

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None, turned: bool = False) -> torch.Tensor:
        """Normal numbers; `turned` lays axes 1 and 2 out as a transposed projection does."""
        if turned:
            first, second, third, *rest = sizes
            return self(first, third, second, *rest, dtype=dtype).transpose(1, 2)
        return torch.randn(sizes, generator=self.generator).to(dtype or self.dtype)


@dataclass(frozen=True)
class _Heads:
    """Sizes of an attention."""

    batch: int
    heads: int
    kv_heads: int
    size: int
    value_size: int


@st.composite
def _heads(draw: st.DrawFn) -> _Heads:
    kv_heads = draw(st.integers(1, 3))
    size = draw(st.sampled_from(HEAD_SIZES))
    other = draw(st.booleans())
    return _Heads(
        draw(st.integers(1, 3)),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        size,
        draw(st.sampled_from(HEAD_SIZES)) if other else size,
    )


WINDOWS = st.sampled_from((None, 1, 2, 5, 64))
SOFTCAPS = st.sampled_from((None, 2.0, 30.0))


def _attention_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = _Numbers(draw, dtype)
        of = draw(_heads())
        queries = draw(st.sampled_from(LENGTHS))
        keys = queries + draw(st.sampled_from((0, 0, 1, 6)))
        causal, window = draw(st.booleans()), draw(WINDOWS)
        turned = draw(st.booleans())
        q = random(of.batch, of.heads, queries, of.size, turned=turned)
        k = random(of.batch, of.kv_heads, keys, of.size, turned=turned)
        v = random(of.batch, of.kv_heads, keys, of.value_size, turned=turned)
        mask = _mask_of(draw, random, of, queries, keys)
        sinks = random(of.heads) if draw(st.booleans()) else None
        seen = _seen(mask, queries, keys, causal, window)
        arguments = (q, k, v, mask, sinks, of.size**-0.5, causal, window, draw(SOFTCAPS))
        # A query that sees no key has no meaning.
        return Sample(arguments, seen.any(-1, keepdim=True).expand(of.batch, of.heads, queries, 1))

    return samples()


def _mask_of(draw: st.DrawFn, random: _Numbers, of: _Heads, queries: int, keys: int) -> torch.Tensor | None:
    kind = draw(st.sampled_from(("none", "padding", "bool", "bias")))
    if kind == "none":
        return None
    if kind == "padding":
        padding = torch.ones(of.batch, keys, dtype=torch.bool)
        padding[-1, : draw(st.integers(0, keys - 1))] = False
        return padding
    rows, heads = draw(st.sampled_from(((of.batch, of.heads), (1, 1), (of.batch, 1))))
    noise = random(rows, heads, queries, keys)
    return noise > -0.5 if kind == "bool" else noise


def _rms_norm_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = _Numbers(draw, dtype)
        width = draw(st.sampled_from((1, 2, 3, 7, 64, 129)))
        shape = draw(st.sampled_from(((1,), (2, 3), (1, 5, 2), (0, 2))))
        x = random(*shape, width) * draw(st.sampled_from((1.0, 1e-3, 100.0)))
        weight = random(width) if draw(st.booleans()) else None
        return Sample((x, weight, draw(st.sampled_from((1e-5, 1e-6, 0.1))), draw(st.booleans())))

    return samples()


def _rotary_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = _Numbers(draw, dtype)
        width = 2 * draw(st.integers(1, 5))
        rest = draw(st.integers(0, 3))
        near = draw(st.booleans())
        batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from(LENGTHS))
        x = random(batch, heads, length, width + rest, turned=draw(st.booleans()))
        angle = 3 * random(draw(st.sampled_from((1, batch))), 1, length, width // 2, dtype=torch.float32)
        angle = angle.repeat_interleave(2, -1) if near else torch.cat([angle, angle], -1)
        return Sample((x, angle.cos().to(dtype), angle.sin().to(dtype), near))

    return samples()


def _mask_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = _Numbers(draw, dtype)
        queries = draw(st.sampled_from(LENGTHS))
        keys = queries + draw(st.sampled_from((0, 1, 6)))
        batch = draw(st.integers(1, 3))
        padding = random(batch, keys) > -0.5 if draw(st.booleans()) else None
        anchor = torch.zeros(batch, 1, dtype=dtype)
        return Sample((anchor, padding, queries, keys, draw(st.booleans()), draw(WINDOWS)))

    return samples()


def _cached_samples(dtype: torch.dtype) -> st.SearchStrategy[Sample]:
    @st.composite
    def samples(draw: st.DrawFn) -> Sample:
        random = _Numbers(draw, dtype)
        count, tree = draw(st.sampled_from(((1, False), (2, False), (3, True), (3, False), (7, True), (2, True))))
        of = draw(_heads())
        held = draw(st.lists(st.integers(0, 9), min_size=of.batch, max_size=of.batch))
        held = [held[0]] * of.batch if draw(st.booleans()) else held
        capacity = max(held) + count + draw(st.integers(0, 3))
        lengths = torch.tensor(held)
        ancestors = _ancestors(random, of.batch, count, tree)
        positions = lengths[:, None] + ancestors.sum(-1) - 1
        arguments = (
            random(of.batch, of.heads, count, of.size),
            random(of.batch, of.kv_heads, count, of.size),
            random(of.batch, of.kv_heads, count, of.value_size),
            random(of.batch, of.kv_heads, capacity, of.size),
            random(of.batch, of.kv_heads, capacity, of.value_size),
            lengths,
            positions.expand(of.batch, count).contiguous(),
            ancestors,
            random(1, of.heads, count, capacity) if draw(st.booleans()) else None,
            random(of.heads) if draw(st.booleans()) else None,
            of.size**-0.5,
            draw(WINDOWS),
            draw(SOFTCAPS),
        )
        return Sample(arguments)

    return samples()


def _ancestors(random: _Numbers, batch: int, count: int, tree: bool) -> torch.Tensor:
    """Which new token sees which `[B or 1, S, S]`: ordinary text, or a tree of its own for each row."""
    if not tree:
        return torch.ones(1, count, count, dtype=torch.bool).tril()
    made = torch.eye(count, dtype=torch.bool).repeat(batch, 1, 1)
    for row in range(batch):
        for node in range(1, count):
            made[row, node] |= made[row, int(torch.randint(node, (), generator=random.generator))]
    return made


# --- what it means -------------------------------------------------------------------------------------------------


def _seen(mask: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None) -> torch.Tensor:
    """Which key each query sees, bool `[B or 1, H or 1, S, T]`, pair by pair; the last query stands at the last key."""
    seen = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    for i in range(queries):
        at = i + keys - queries
        for j in range(keys):
            near = window is None or (at - j < window and (causal or j - at < window))
            seen[0, 0, i, j] = near and (j <= at or not causal)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & (mask[:, None, None, :] if mask.dim() == 2 else mask)
    return seen


def _weighted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax over the keys that are seen, head by head: query head h reads KV head h // (H / K)."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    seen = seen.expand(batch, heads, queries, k.shape[2])
    out = q.new_zeros(batch, heads, queries, v.shape[3])
    for head in range(heads):
        logits = torch.einsum("bsd,btd->bst", q[:, head], k[:, head // group]) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias.expand(batch, heads, -1, -1)[:, head]
        logits = logits.masked_fill(~seen[:, head], -torch.inf)
        weights = logits.exp() if sinks is None else (logits - sinks[head]).exp()
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else 1)
        out[:, head] = torch.einsum("bst,bte->bse", weights / total, v[:, head // group])
    return out


def _attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    seen = _seen(mask, q.shape[2], k.shape[2], causal, window)
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    return _weighted(q, k, v, seen, bias, sinks, scale, softcap)


def _mask_reference(
    anchor: torch.Tensor, padding: torch.Tensor | None, queries: int, keys: int, causal: bool, window: int | None
) -> torch.Tensor:
    return _seen(padding, queries, keys, causal, window)


def _rms_norm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain_in_float: bool) -> torch.Tensor:
    normed = x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()
    return normed if weight is None else normed * weight


def _rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair of features as a complex number, times a unit one."""
    width = cos.shape[-1]
    one, two = (
        (slice(0, width, 2), slice(1, width, 2)) if interleaved else (slice(width // 2), slice(width // 2, width))
    )
    turned = torch.complex(x[..., one], x[..., two]) * torch.complex(cos[..., one], sin[..., one])
    out = x.clone()
    out[..., one], out[..., two] = turned.real, turned.imag
    return out


def _cached_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    ancestors: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Row by row: committed entries and ancestors, gathered; a bias speaks of the key's position."""
    rows = []
    count = q.shape[2]
    for row, held in enumerate(lengths.tolist()):
        keys[row, :, held : held + count], values[row, :, held : held + count] = k[row], v[row]
        tree = ancestors[row if ancestors.shape[0] > 1 else 0]
        places = [*range(held), *positions[row].tolist()]
        seen = torch.zeros(1, 1, count, held + count, dtype=torch.bool)
        for i in range(count):
            for j, place in enumerate(places):
                near = window is None or int(positions[row, i]) - place < window
                seen[0, 0, i, j] = near and (j < held or bool(tree[i, j - held]))
        bias = None if mask is None else mask[..., places]
        k_row, v_row = keys[row : row + 1, :, : held + count], values[row : row + 1, :, : held + count]
        rows.append(_weighted(q[row : row + 1], k_row, v_row, seen, bias, sinks, scale, softcap))
    return torch.cat(rows)


CONTRACTS: dict[Any, Contract] = {
    contract.op: contract
    for contract in (
        Contract(attention, _attention_samples, _attention_reference),
        Contract(attention_mask, _mask_samples, _mask_reference),
        Contract(cached_attention, _cached_samples, _cached_reference, writes=(3, 4)),
        Contract(rms_norm, _rms_norm_samples, _rms_norm_reference),
        Contract(rotary, _rotary_samples, _rotary_reference),
    )
}
