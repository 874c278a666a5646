"""Differential testing of ops: any lowering of a graphopt op against the op's meaning, at odd shapes and in each dtype.

A contract says of an op what may be asked of it (`sample`) and what it means (`reference`, written from the definition
and run in float64). `check_lowering(op, kernel)` holds a kernel to both; the op's own eager kernel is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from graphopt.testing.contracts import CONTRACTS, Contract, Sample
from graphopt.testing.contracts.contract import Arguments, said

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A lowering sums in another order than the eager kernel, which may happen to round better.
SLACK = 3.0
ROUNDINGS = 4.0
EXACT = 4096.0


class LoweringBroken(AssertionError):
    """A lowering does not compute what its op means."""


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
            raise LoweringBroken(f"{what} is {said(ours)} and not {usual.dtype}{list(true.shape)}\n  at {sample}")
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
    # What is infinite must be infinite; what is not has no rounding of infinity.
    finite = true.isfinite()
    if not torch.equal(ours[~finite].to(torch.float64), true[~finite].to(torch.float64)):
        return torch.inf, 0.0
    ours, usual, true = ours[finite], usual[finite], true[finite]
    if not true.numel():
        return 0.0, 0.0
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
