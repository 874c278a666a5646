"""A small program by hand, as text: an embedding, a norm, a tied product, a table, and padding and positions as inputs."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.program import Program
from graphopt.ir.text import parse_program
from graphopt.ir.weights import MemorySource

TEXT = """graphopt 1
dtype bf16
dim B 1..8 hint 2
dim S 1..64 hint 5
input $ids i64[B, S] tokens
input $mask i64[B, S] padding
input $places i64[B, S] positions
weight @embed.weight parameter bf16[7, 4] aliases @head.weight
weight @norm.weight parameter bf16[4]
weight @table constant f32[64, 4]
%embed = aten.embedding.default(@embed.weight, $ids)  # model.embed
%place = aten.embedding.default(@table, $places)  # model
%wide = aten.to.dtype(%embed, f32)  # model.layers.0
%joined = aten.add.Tensor(%wide, %place)  # model.layers.0
%back = aten.to.dtype(%joined, bf16)  # model.layers.0
%norm = graphopt.rms_norm.default(%back, @norm.weight, 1e-05, False)  # model.norm
%logits = aten.linear.default(%norm, @embed.weight)  # head
%seen = aten.unsqueeze.default($mask, -1)
%shown = aten.mul.Tensor(%logits, %seen)
return logits = %shown, hidden = %norm
"""
TABLE = torch.linspace(-1, 1, 256).reshape(64, 4)
EMBED = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
GAIN = torch.tensor([1.0, 2.0, 0.5, 1.5]).to(torch.bfloat16)


def make(text: str = TEXT) -> Program:
    """The program of a text, with the tensors above."""
    source = MemorySource({"embed.weight": EMBED, "norm.weight": GAIN})
    return parse_program(text, {"table": TABLE}, source)


@pytest.fixture(scope="package")
def by_hand() -> Program:
    """The program that this package's tests share; programs are values."""
    return make()
