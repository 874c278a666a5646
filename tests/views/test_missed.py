"""What looks like a part and is in no view has a reason that `explain` shows, and parts that are viewed have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.frontend.export import capture_module
from graphopt.ir.program import Input
from graphopt.report.explain import explain
from graphopt.views import Views
from tests.views import structures as s


class Spread(s.Feed):
    """A feed-forward whose neurons are scaled by their norm over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.a(x))
        return self.c(y * torch.linalg.vector_norm(y, dim=1, keepdim=True))  # type: ignore[no-any-return]


class Adapted(s.Feed):
    """A feed-forward whose up projection has a low-rank product added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e = nn.Linear(s.WIDTH, 2, bias=False), nn.Linear(2, s.NEURONS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.gelu(self.a(x) + self.e(self.d(x))))  # type: ignore[no-any-return]


class Thrice(s.Feed):
    """A feed-forward with two gates."""

    def __init__(self) -> None:
        super().__init__(gate=True)
        self.d = nn.Linear(s.WIDTH, s.NEURONS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.b is not None
        return self.c(nn.functional.silu(self.a(x)) * self.b(x) * self.d(x))  # type: ignore[no-any-return]


class Scored(nn.Module):
    """A softmax over products of queries and keys that weighs no values: its highest weight scales the token."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(s.WIDTH, s.WIDTH), nn.Linear(s.WIDTH, s.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.softmax(self.a(x) @ self.b(x).transpose(1, 2), -1).amax(-1, keepdim=True)


class Twice(s.Model):
    """A model that runs its layers a second time on the embedding turned round."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        y = -x
        for layer in self.x:
            x, y = layer(x), layer(y)
        return self.h(self.n(x) - self.n(y))  # type: ignore[no-any-return]


def _views(model: nn.Module) -> Views:
    return Views(capture_module(model.eval(), (Input("ids", ("B", "S"), torch.int64, "tokens"),)))


@pytest.mark.parametrize(
    ("feed", "reason"),
    [
        (Spread, "joins values between its activation and its products"),
        (Adapted, "2 products that read different values"),
        (Thrice, "its neurons are made by 3 products"),
    ],
)
def test_feed_forwards_in_no_view_have_a_reason(feed: Any, reason: str) -> None:
    torch.manual_seed(0)
    views = _views(s.Model(*(s.Layer(s.Attend(), feed()) for _ in range(3))))
    assert len(views.attentions) == 3
    assert not views.feed_forwards
    assert [(one.what, reason in one.reason) for one in views.unseen] == [
        (f"feed-forward x.{layer}.f", True) for layer in range(3)
    ]
    assert reason in explain(views.program).plain()


def test_softmaxes_in_no_view_have_a_reason() -> None:
    views = _views(s.Model(*(s.Layer(Scored(), s.Feed()) for _ in range(3))))
    assert [one.reason for one in views.unseen if one.what.startswith("attention")] == [
        "its softmax of products of two values is no plain attention; it is left alone"
    ] * 3


def test_parts_in_no_layer_have_a_reason() -> None:
    views = _views(Twice(*(s.Layer(s.Attend(), s.Feed()) for _ in range(3))))
    held = [part for block in views.blocks for part in (*block.attentions, *block.feed_forwards)]
    missing = len(views.attentions) + len(views.feed_forwards) - len(held)
    reasons = [one.reason for one in views.unseen]
    assert len(views.attentions) == len(views.feed_forwards) == 6
    assert missing > 0
    assert len(reasons) == missing if views.blocks else reasons == ["no repeated residual structure was found"]
