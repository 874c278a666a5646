"""A sample of torch's op database through `torch.compile`, as benchmarks/op_db.py runs all of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.op_db import judge, modules

EVERY = 23  # a prime: neighbours in the list are alike


def ops() -> list[object]:
    from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)[::EVERY]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_op_is_wrong_and_none_fails(dtype: torch.dtype, interpret: bool) -> None:
    options = {"interpret": True} if interpret else None
    found = {
        op.name: judge(op, dtype, "graphopt", options, 1)  # type: ignore[attr-defined]
        for op in ops()
        if dtype in op.supported_dtypes("cpu")  # type: ignore[attr-defined]
    }
    assert len(found) > 20
    assert not {name: why for name, why in found.items() if why[0] in ("wrong", "backend_error", "not_capturable")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("interpret", [False, True])
def test_no_module_is_wrong_and_none_fails(interpret: bool) -> None:
    options = {"interpret": True} if interpret else None
    some = modules()[::11]
    some += [case for case in modules() if case.name == "nn.BatchNorm2d"]
    found = {case.name: judge(case, torch.float32, "graphopt", options, 1) for case in some}
    assert len(found) > 10
    assert not {name: why for name, why in found.items() if why[0] != "ok"}
