"""Modules that write into tensors and views are captured as values."""

from __future__ import annotations

import torch

from graphopt.frontend import capture_module
from graphopt.ir.program import Input


class Writes(torch.nn.Module):
    """Writes through slices, selects, views, transposes, masks, and inside a no-grad region; old views are read late."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.lin(x)
        view, flat = h[:, 1:3], h.view(-1, 6)
        h[:, 0].mul_(2.0)
        h[:, 1:2] = 5.0
        view.add_(x[:, 1:3])
        made = torch.zeros(x.shape[0], 6)
        made[:, 2:] = flat[:, 2:]
        made[:, ::2].copy_(x[:, ::2])
        turned = h.unsqueeze(1).transpose(1, 2)
        turned[:, 4] = 1.5
        h.masked_fill_(h > 3, 0.0)
        h += made
        with torch.no_grad():
            made.relu_()
        picked = torch.zeros_like(h)
        picked.scatter_(1, torch.ones(x.shape[0], 1, dtype=torch.long), 3.0)
        h[h < -1] = 0.25
        return h, view.sum(-1), flat * 1, made, picked, turned + 0


def test_writes_become_values() -> None:
    torch.manual_seed(0)
    module = Writes()
    program = capture_module(module, (Input("x", ("B", 6), torch.float32),))
    for node in program.graph.graph.nodes:
        assert not (node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False))
    x = 2 * torch.randn(5, 6)
    with torch.no_grad():
        for got, expected in zip(program.module()(x=x), module(x), strict=True):
            torch.testing.assert_close(got, expected)


class Pieces(torch.nn.Module):
    """A tensor made empty and filled piece by piece, and one of which a piece stays empty."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = x.new_empty(x.shape[0], 9)
        whole[:, 6:] = x[:, :1]
        whole[:, :6] = x
        part = torch.zeros(x.shape[0], 9)
        part[:, :6] = x
        return whole, part


def test_pieces_that_fill_a_tensor_are_joined() -> None:
    program = capture_module(Pieces(), (Input("x", ("B", 6), torch.float32),))
    ops = [str(node.target) for node in program.graph.graph.nodes if node.op == "call_function"]
    assert ops.count("aten.cat.default") == 1
    assert ops.count("aten.slice_scatter.default") == 1
    x = torch.randn(5, 6)
    for got, expected in zip(program.module()(x=x), Pieces()(x), strict=True):
        torch.testing.assert_close(got, expected)
