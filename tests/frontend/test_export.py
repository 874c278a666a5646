"""Capturing plain modules: names, dimensions that export narrows or fixes, and errors that name the model's line."""

from __future__ import annotations

import inspect

import pytest
import torch

from graphopt.diagnostics import CaptureError
from graphopt.frontend import capture_module
from graphopt.ir.program import Dim, Input, Program

TOKENS = (Input("input_ids", ("B", "S"), torch.int64, "tokens"),)
WIDE = (Input("x", ("B", "S", 4), torch.float32),)


class Clash(torch.nn.Module):
    """Two parameters whose names differ in a dot alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Module()
        self.a.b = torch.nn.Parameter(torch.full((4,), 2.0))
        self.a_b = torch.nn.Parameter(torch.full((4,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a.b + self.a_b


class LearntPositions(torch.nn.Module):
    """A table of 24 positions: longer sequences do not exist."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(24, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[: x.shape[1]]


class Scan(torch.nn.Module):
    """A loop over the sequence in Python: one length is all that a graph can hold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, seen = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = 0.5 * state + x[:, step]
            seen.append(state)
        return torch.stack(seen, 1)


class Branches(torch.nn.Module):
    """What happens next depends on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def same(module: torch.nn.Module, program: Program, batch: int, length: int) -> None:
    x = torch.randn(batch, length, 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x=x)[0], module(x))


def dim(program: Program, name: str) -> Dim:
    return next(d for d in program.dims if d.name == name)


def test_names_that_differ_in_a_dot() -> None:
    module = Clash()
    program = capture_module(module, WIDE)
    names = [node.name for node in program.graph.graph.nodes]
    assert len(set(names)) == len(names)
    same(module, program, 2, 3)


def test_a_range_that_the_model_bounds() -> None:
    module = LearntPositions()
    program = capture_module(module, WIDE)
    assert (dim(program, "S").low, dim(program, "S").high) == (1, 24)
    for length in (1, 7, 24):
        same(module, program, 2, length)


def test_a_loop_over_the_sequence_fixes_it_and_leaves_the_batch() -> None:
    program = capture_module(Scan(), WIDE, dims=(Dim("B", 1, 64, 3), Dim("S", 1, 64, 5)))
    assert (dim(program, "S").low, dim(program, "S").high) == (5, 5)
    assert (dim(program, "B").low, dim(program, "B").high) == (1, 64)
    assert program.entry.inputs[0].shape == ("B", 5, 4)
    for batch in (1, 4):
        same(Scan(), program, batch, 5)


def test_a_length_chosen_by_the_caller() -> None:
    program = capture_module(Scan(), WIDE, dims=(Dim("B", 1, 64, 3), Dim("S", 9, 9, 9)))
    same(Scan(), program, 2, 9)


def test_what_cannot_be_exported_names_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as caught:
        capture_module(Branches(), WIDE)
    lines, start = inspect.getsourcelines(Branches)
    line = start + next(i for i, text in enumerate(lines) if "x.sum()" in text)
    found = caught.value.diagnostics[0]
    assert any(note.endswith(f"test_export.py:{line} in forward") for note in found.notes)
    assert not any("TORCH_LOGS" in note for note in found.notes)
    assert "torch.where" in found.help[0]
    assert not capsys.readouterr().err
