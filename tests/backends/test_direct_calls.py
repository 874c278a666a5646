"""Graphs for a CPU that records no gradients: Dynamo's own graph with fewer and faster calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.backends import library
from tests.tiny import make_model, tokens


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: Any) -> tuple[Any, list[dict[str, Any]]]:
    report: list[dict[str, Any]] = []
    return torch.compile(model, backend="graphopt", options={"report": report}, dynamic=True), report


def ours(report: list[dict[str, Any]]) -> dict[str, int]:
    """Which of our calls a graph has."""
    return {
        name.rpartition(".")[2]: count for name, count in report[0]["library"].items() if "backends.library" in name
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"rms_norm": 7, "rotate": 6, "linear": 22}),
        ("gpt2", {"linear": 13}),
    ],
)
def test_a_transformer_has_fewer_calls_and_eagers_results(name: str, expected: dict[str, int]) -> None:
    model = make_model(name)
    model.config.use_cache = False
    run, report = compiled(model)
    exact = make_model(name).double()
    with torch.no_grad():
        for length in (6, 9, 30):
            ids = tokens(2, length)
            wanted, base, got = exact(ids).logits, model(ids).logits, run(ids).logits
            error, allowed = (got - wanted).abs().max(), (base - wanted).abs().max()
            assert error <= 4 * allowed + 1e-7
    assert len(report) == 1
    assert report[0]["mode"] == "eager library calls"
    assert ours(report) == expected


def test_rotations_and_norms_round_as_eager_does() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 7, 5, 16).transpose(1, 2), torch.randn(16)
    cos, sin = torch.randn(3, 1, 7, 16), torch.randn(3, 1, 7, 16)
    turned = torch.cat((-x[..., 8:], x[..., :8]), -1)
    torch.testing.assert_close(library.rotate(x, cos, sin), x * cos + turned * sin)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(library.rms_norm(x, 1e-5, weight), weight * (x * scale))


@pytest.mark.parametrize("shape", [(2, 256), (3, 100, 256), (0, 256), (1, 300, 256)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_any_size(shape: tuple[int, ...], transposed: bool) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(shape), torch.randn(301)
    weight = torch.randn(256, 301).t() if transposed else torch.randn(301, 256)
    for given in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        torch.testing.assert_close(library.linear(x, weight, given).double(), exact, rtol=1e-5, atol=1e-4)
    side = torch.randn(256, *shape[:-1])
    skew = side.movedim(0, -1)
    torch.testing.assert_close(library.linear(skew, weight), F.linear(skew, weight), rtol=1e-4, atol=1e-4)


def twice(x: torch.Tensor, y: torch.Tensor) -> Any:
    a = x * y
    return a + 1, a - 1


def returned(x: torch.Tensor, y: torch.Tensor) -> Any:
    a = x + y
    b = a * 2
    return b, a


def seen(x: torch.Tensor, y: torch.Tensor) -> Any:
    a = x * y
    first = a[:, 0]
    b = F.silu(a)
    return b + y, first


def written(x: torch.Tensor, y: torch.Tensor) -> Any:
    a = x * 2
    y.add_(a)
    return (a + y) * y


def broadcast(x: torch.Tensor, y: torch.Tensor) -> Any:
    return (x[:1] * 2) * y + (y[:, :1] + 1)


def strided(x: torch.Tensor, y: torch.Tensor) -> Any:
    return ((x.t() * 2) + y.t().contiguous(), torch.cat((x, y)).t() * 2)


def wider(x: torch.Tensor, y: torch.Tensor) -> Any:
    return (x.to(torch.float32) * 2) * y.double(), (x > 0) * (y * 3)


def same(x: torch.Tensor, y: torch.Tensor) -> Any:
    a = x.float()
    a.mul_(2)
    b = y * 2
    return a + x, b * b


def mapped(x: torch.Tensor, y: torch.Tensor) -> Any:
    return torch.vmap(lambda a, b: F.silu(F.linear(a * 2, y)) + b)(x, y)


def norm_of_what_changes(x: torch.Tensor, y: torch.Tensor) -> Any:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    x.mul_(2)
    return x * scale


def turn_of_what_changes(x: torch.Tensor, y: torch.Tensor) -> Any:
    straight = x * y
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    x[0] = 0
    y += 1
    return straight + turned * y


@pytest.mark.parametrize(
    "function",
    [
        twice,
        returned,
        seen,
        written,
        broadcast,
        strided,
        wider,
        same,
        mapped,
        norm_of_what_changes,
        turn_of_what_changes,
    ],
    ids=lambda f: f.__name__,
)
def test_overwriting_changes_no_result(function: Callable[..., Any]) -> None:
    """Bit by bit what eager returns, strides and arguments that were written included."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    mine, wanted = (x.clone(), y.clone()), (x.clone(), y.clone())
    run, _ = compiled(function)
    with torch.no_grad():
        got, expected = run(*mine), function(*wanted)
    for a, b in zip((*(got if isinstance(got, tuple) else (got,)), *mine),
                    (*(expected if isinstance(expected, tuple) else (expected,)), *wanted), strict=True):  # fmt: skip
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_what_is_written_into_weights_is_seen() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).eval()
    run, report = compiled(model)
    x = torch.randn(300, 64)
    with torch.no_grad():
        run(x)
        model[0].weight.data.mul_(2)
        model[2].weight.copy_(torch.randn(64, 128))
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert ours(report) == {"linear": 2}
    assert len(report) == 1


def test_other_numbers_than_float32_are_left_alone() -> None:
    model = nn.Linear(64, 64).bfloat16()
    run, report = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        x = torch.randn(300, 64, dtype=torch.bfloat16)
        assert torch.equal(run(x), model(x))
    assert ours(report) == {}
    half, report = compiled(nn.Linear(64, 64))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(torch.randn(300, 64)).dtype == torch.bfloat16
    assert ours(report) == {}


def test_gradients_inside_a_graph_that_records_none_outside() -> None:
    """A graph that turns gradients on for a part keeps that part as it is."""
    linear = nn.Linear(64, 64)
    linear.requires_grad_(False)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = (linear(x) * 2).sigmoid()
        return y + 1

    run, _ = compiled(function)
    x = torch.randn(300, 64, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), function(x))
