"""Weights as expressions: shape and dtype without data, values by hand, one rounding, ties counted once."""

from __future__ import annotations

import pytest
import torch

from graphopt.diagnostics import ArtifactError
from graphopt.ir.weights import (
    Affine,
    BlockMap,
    Cat,
    Const,
    Expr,
    MatMul,
    MemorySource,
    Source,
    Sum,
    Take,
    Weight,
    WeightStore,
)

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
A = torch.arange(12, dtype=f32).reshape(3, 4)
B = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0], [2.0, 2.0]])
V = torch.tensor([1.0, 2.0, 3.0])
SOURCE = MemorySource({"a": A, "b": B, "v": V, "half": A.to(bf16), "count": torch.tensor([3, 5])})


def a() -> Source:
    return Source("a", (3, 4), f32)


def b() -> Source:
    return Source("b", (4, 2), f32)


def v() -> Source:
    return Source("v", (3,), f32)


def value(expr: Expr, dtype: torch.dtype | None = None, kind: str = "parameter") -> torch.Tensor:
    return WeightStore({"w": Weight("w", expr, kind)}, SOURCE).evaluate("w", dtype)


MAPS = torch.stack(
    [
        torch.stack([torch.eye(2) / 2, torch.eye(2) / 2]),
        torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 2.0]]]),
    ]
)
CASES: dict[str, tuple[Expr, torch.Tensor, str]] = {
    "source": (a(), A, "a"),
    "const": (Const(V, f32), V, "const[3]"),
    "take rows": (Take(a(), 0, (2, 0)), A[[2, 0]], "take(a, axis 0, 2 of 3)"),
    "take columns": (Take(a(), 1, (3, 1, 1)), A[:, [3, 1, 1]], "take(a, axis 1, 3 of 4)"),
    "cat rows": (Cat((a(), Take(a(), 0, (1,))), 0), A[[0, 1, 2, 1]], "cat(a, take(a, axis 0, 1 of 3))"),
    "cat columns": (Cat((a(), Take(a(), 1, (0,))), 1), A[:, [0, 1, 2, 3, 0]], "cat(a, take(a, axis 1, 1 of 4))"),
    "scaled": (Affine(v(), -2.5), -2.5 * V, "-2.5 * v"),
    "shifted": (Affine(v(), 2.0, 0.25), 2 * V + 0.25, "2 * v + 0.25"),
    "product": (MatMul(a(), b(), f32), A @ B, "(a @ b)"),
    "product with a vector": (MatMul(Take(a(), 1, (0, 1, 2)), v(), f32), A[:, :3] @ V, "(take(a, axis 1, 3 of 4) @ v)"),
    "sum": (Sum((v(), v(), Affine(v(), 3.0))), 5 * V, "v + v + 3 * v"),
    "map": (
        BlockMap(b(), 0, ((0, 1), (1, 0)), MAPS),
        torch.cat([(B[:2] + B[2:]) / 2, B[[3, 2]] + 2 * B[:2]]),
        "map(b, axis 0, 4 slices to 2)",
    ),
    "map of columns": (
        BlockMap(Source("a", (3, 4), f32), 1, ((1, 0),), MAPS[1:]),
        (A[:, [3, 2]] + 2 * A[:, :2]),
        "map(a, axis 1, 2 slices to 1)",
    ),
    "map to wider slices": (
        BlockMap(a(), 1, ((0,), (1,), (0,)), torch.ones(3, 1, 3, 2)),
        torch.stack([A[:, :2].sum(1), A[:, 2:].sum(1), A[:, :2].sum(1)], 1).repeat_interleave(3, 1),
        "map(a, axis 1, 3 slices to 3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_shape_and_value(name: str) -> None:
    expr, expected, words = CASES[name]
    assert expr.shape == tuple(expected.shape)
    assert all(isinstance(size, int) for size in expr.shape)
    assert expr.dtype == f32
    assert torch.equal(value(expr), expected)
    assert torch.equal(value(expr, f64), expected.to(f64))
    assert expr.describe() == words


def test_parts_are_what_is_read() -> None:
    one, two = a(), b()
    assert a().parts() == Const(V, f32).parts() == ()
    assert Take(one, 0, (0,)).parts() == (one,)
    assert Cat((one, two), 0).parts() == Sum((one, two)).parts() == MatMul(one, two, f32).parts() == (one, two)
    assert Affine(one, 2.0).parts() == BlockMap(one, 0, ((0,),), MAPS).parts() == (one,)


def test_the_plain_expression_has_no_meaning() -> None:
    for ask in (lambda: Expr().shape, lambda: Expr().compute([]), lambda: Expr().describe()):
        with pytest.raises(NotImplementedError):
            ask()


def test_expressions_are_values() -> None:
    samples = [expr for expr, _, _ in CASES.values()]
    for expr in samples:
        with pytest.raises(AttributeError):
            expr.part = a()  # type: ignore[attr-defined]
    # Identity, not contents: a tensor inside has no truth value when it is compared.
    assert Const(V, f32) != Const(V, f32)
    assert len({*samples, *samples}) == len(samples)
    with pytest.raises(AttributeError):
        Weight("w", a()).name = "x"  # type: ignore[misc]
    assert Weight("w", samples[0]) == Weight("w", samples[0])


def test_storage_rounds_once() -> None:
    half = Source("half", (3, 4), bf16)
    assert half.dtype == Take(half, 0, (0,)).dtype == bf16
    third = Affine(Affine(half, 1 / 3), 3.0)
    assert value(third).dtype == bf16
    # Through bfloat16 in between, 3 * round(x / 3) is off; in float32 and rounded once it is x again.
    assert torch.equal(value(third), A.to(bf16))
    assert value(third, f64).dtype == f64
    assert torch.equal(value(third, f64), A.to(f64) * (1 / 3) * 3)
    assert value(third, f32).dtype == f32
    # A run in float32 uses the bits that are stored.
    fine = Affine(half, 1 + 2**-12)
    assert torch.equal(value(fine, f32), A.to(bf16).to(f32))
    assert torch.equal(value(fine, f64), A.to(f64) * (1 + 2**-12))


def test_products_and_sums_are_made_in_the_wider_dtype() -> None:
    product = MatMul(Source("half", (3, 4), bf16), b(), bf16)
    assert product.dtype == bf16
    mixed = product.compute([A.to(bf16), B.to(f64)])
    assert mixed.dtype == f64
    assert torch.equal(mixed, A.to(f64) @ B.to(f64))
    assert MatMul(a(), b(), f32).compute([A.to(f64), B]).dtype == f64
    assert Sum((a(), a())).compute([A, A.to(bf16)]).dtype == f32
    assert BlockMap(b(), 0, ((0, 1),), MAPS[:1].to(f64)).compute([B]).dtype == f32


def test_tables_and_integers_keep_their_type() -> None:
    count = Source("count", (2,), torch.int64)
    for dtype in (None, f32, f64, bf16):
        assert value(count, dtype).dtype == torch.int64
        assert value(Take(count, 0, (1,)), dtype).dtype == torch.int64
        assert value(Take(count, 0, (1,)), dtype).tolist() == [5]
    # A constant table keeps its dtype in a narrow run (statistics and angles need it), and widens in float64.
    assert value(Const(V, f32), bf16, "constant").dtype == f32
    assert value(Const(V, f32), f64, "constant").dtype == f64
    assert value(Const(V, f32), bf16, "parameter").dtype == bf16
    assert value(Const(V, bf16)).dtype == bf16


def test_results_are_laid_out_as_loaded() -> None:
    turned = WeightStore({"w": Weight("w", Const(A.T, f32))}, None).evaluate("w")
    assert turned.is_contiguous()
    assert value(MatMul(Const(B.T, f32), Const(A.T, f32), f32)).is_contiguous()
    moved = WeightStore({"w": Weight("w", a())}, SOURCE).evaluate("w", None, "meta")
    assert moved.device.type == "meta"


def test_what_is_not_there() -> None:
    store = WeightStore({"w": Weight("w", a())})
    with pytest.raises(LookupError, match="captured without weights, so 'a' cannot be read"):
        store.evaluate("w")
    with pytest.raises(KeyError):
        value(Source("nothing", (1,), f32))
    broken = MemorySource({"a": torch.tensor([1.0, float("nan"), float("-inf")])})
    with pytest.raises(ArtifactError) as caught:
        WeightStore({"w": Weight("w", Affine(Source("a", (3,), f32), 2.0))}, broken).evaluate("w")
    assert caught.value.code == "not_finite"
    assert "'a' holds 2 NaN or infinite values of 3" in str(caught.value)
    assert value(Source("count", (2,), torch.int64)).tolist() == [3, 5]


def test_a_store_counts_parameters_and_bytes() -> None:
    store = WeightStore(
        {
            "w": Weight("w", a(), aliases=("tied",)),
            "half": Weight("half", Source("half", (3, 4), bf16)),
            "scalar": Weight("scalar", Const(torch.tensor(1.0), f32)),
            "seen": Weight("seen", v(), "buffer"),
            "table": Weight("table", Const(V, f32), "constant"),
        },
        SOURCE,
    )
    assert store.parameters == 12 + 12 + 1
    assert store.bytes == 12 * 4 + 12 * 2 + 4 + 3 * 4
    assert len(store) == 5
    assert list(store) == ["w", "half", "scalar", "seen", "table"]
    assert "w" in store
    assert "tied" not in store
    assert Weight("w", a()).kind == "parameter"


def test_stores_are_values() -> None:
    store = WeightStore({"w": Weight("w", a()), "v": Weight("v", v())}, SOURCE)
    cut = store.with_expr("w", lambda expr: Take(expr, 0, (0,)))
    assert cut["w"].expr.shape == (1, 4)
    assert store["w"].expr.shape == (3, 4)
    assert cut.parameters == 4 + 3
    assert store.parameters == 12 + 3
    assert cut["v"] is store["v"]
    more = store.with_weight(Weight("new", b()))
    assert list(more) == ["w", "v", "new"]
    assert len(store) == 2
    assert list(more.only({"new", "v"})) == ["v", "new"]
    assert more.only({"w"}).source is SOURCE
    with pytest.raises(AttributeError):
        store.source = None  # type: ignore[misc]
    with pytest.raises(AttributeError):
        SOURCE.tensors = {}  # type: ignore[misc]
