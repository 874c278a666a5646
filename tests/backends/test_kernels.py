"""Generated kernels: interpreted they equal a float64 reference; compiled ahead of time they fit every target."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends import loops
from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from tests.backends.cases import BOOLEAN, FLOATING, INTEGER, Case, drawn
from tests.backends.conftest import close, reference, trace

INTERPRET = Options(interpret=True)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def lowered(case: Case, dtype: torch.dtype) -> tuple[Lowered, tuple[torch.Tensor, ...]]:
    function, sizes = case
    inputs = drawn(dtype, *sizes)
    return lower_graph(trace(function, *inputs), "cpu", INTERPRET), inputs


def check(case: Case, dtype: torch.dtype) -> Lowered:
    """The kernels' results beside float64 ones, at the traced sizes."""
    made, inputs = lowered(case, dtype)
    got = made(list(inputs))
    got = got if isinstance(got, tuple | list) else (got,)
    assert made.groups, "nothing was generated"
    for mine, wanted in zip(got, reference(case[0], inputs), strict=True):
        assert mine.shape == wanted.shape
        assert mine.stride() == wanted.stride()
        if not mine.dtype.is_floating_point:
            assert torch.equal(mine, wanted.to(mine.dtype))
            continue
        assert close(mine, wanted)
    return made


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", FLOATING)
def test_floating(name: str, dtype: torch.dtype) -> None:
    made = check(FLOATING[name], dtype)
    assert len(made.groups) == 1, [group.ops for group in made.groups]
    assert set(made.library) <= {"aten.sym_size.int"}, made.library


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name: str, dtype: torch.dtype) -> None:
    check(INTEGER[name], dtype)


@pytest.mark.parametrize("name", BOOLEAN)
def test_booleans(name: str) -> None:
    check(BOOLEAN[name], torch.bool)


@pytest.mark.parametrize("name", ["softmax", "layer_residual", "variance", "log_softmax"])
def test_long_rows_are_walked_in_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for rows that do not fit into registers, at rows of several blocks."""
    monkeypatch.setattr(loops, "ROW_LIMIT", 0)
    made = check(FLOATING[name], torch.float32)
    assert "for r_start in range" in made.groups[0].kernel.source


def test_other_sizes_need_no_new_kernel() -> None:
    made, _ = lowered(FLOATING["layer_residual"], torch.float32)
    function = FLOATING["layer_residual"][0]
    for sizes in (((2, 1, 33), (2, 1, 33), (33,), (33,)), ((2, 9, 33), (2, 9, 33), (33,), (33,))):
        inputs = drawn(torch.float32, *sizes)
        for mine, wanted in zip(made(list(inputs)), reference(function, inputs), strict=True):
            torch.testing.assert_close(mine, wanted.float())


def test_strided_inputs_are_read_in_place() -> None:
    made, _ = lowered(FLOATING["softmax"], torch.float32)
    wide = torch.randn(3, 37, 5).transpose(1, 2)
    torch.testing.assert_close(made([wide]), torch.softmax(wide * 0.7, -1))


def test_nan_reaches_the_results() -> None:
    made, (x,) = lowered(FLOATING["variance"], torch.float32)
    x[1, 3, 2] = float("nan")
    var, peak = made([x])
    assert bool(var[1, 2].isnan())
    assert bool(peak[1, 2].isnan())
    assert int(peak.isnan().sum()) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_ahead_of_time_without_spills(target: str) -> None:
    for name in ("gated", "rms_residual", "softmax", "normed_rotary", "padded"):
        made, _ = lowered(FLOATING[name], torch.bfloat16)
        for group in made.groups:
            for used in compile_ahead(group.kernel, target):
                assert used.spilled == 0, (name, used)
                assert 0 < used.registers <= 255
