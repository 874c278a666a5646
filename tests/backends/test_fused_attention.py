"""What stands around an attention becomes a part of its kernel: masks, unpacking of keys and values, pointwise results."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.ahead import TARGETS, compile_ahead
from graphopt.backends.lowering import Lowered, Options, lower_graph
from graphopt.ops import attention, cached_attention, dequantise
from graphopt.ops.quantised import encode, grid, pack
from graphopt.ops.trees import straight
from tests.backends.cases import drawn
from tests.backends.conftest import close, reference, trace

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensor = torch.Tensor
HEADS, KV, KEYS, SIZE, BITS, GROUP = 6, 2, 77, 24, 4, 8


def drawn_to(queries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, gate = drawn(
        dtype, (2, HEADS, queries, SIZE), (2, KV, KEYS, SIZE), (2, KV, KEYS, SIZE), (2, queries, HEADS * SIZE)
    )
    return q, k, v, gate


def one_kernel(function: object, inputs: tuple[Tensor, ...]) -> Lowered:
    """The lowered function, which is a single kernel and right."""
    made = lower_graph(trace(function, *inputs), "cpu", Options(interpret=True))  # type: ignore[arg-type]
    assert len(made.groups) == 1
    assert not [name for name in made.library if "view" not in name and "transpose" not in name and "sym" not in name]
    assert close(made(list(inputs)), reference(function, inputs)[0])  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 41])
def test_a_gate_behind_attention(queries: int, dtype: torch.dtype) -> None:
    """The result is gated and stored by heads side by side."""

    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        y = attention(q, k, v, None, None, 0.2, False, None, None)
        return y.transpose(1, 2).reshape(2, q.shape[2], HEADS * SIZE) * torch.sigmoid(gate)

    made = one_kernel(function, drawn_to(queries, dtype))
    assert "sigmoid" in made.groups[0].ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 41])
def test_masks_are_computed_in_the_kernel(queries: int, dtype: torch.dtype) -> None:
    """A bias by distance with a slope of each head (ALiBi), and a mask of documents: no mask is ever stored."""

    def biased(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        bias = (columns - rows).to(q.dtype)[None, None] * slopes[None, :, None, None]
        return attention(q, k, v, bias, None, 0.2, False, None, None)  # type: ignore[no-any-return]

    def documents(q: Tensor, k: Tensor, v: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        seen = mine[:, None, :, None] == theirs[:, None, None, :]
        return attention(q, k, v, seen, None, 0.2, False, None, None)  # type: ignore[no-any-return]

    q, k, v, _ = drawn_to(queries, dtype)
    # The slopes are powers of two: a bias in half precision is then what it is in float64.
    first = one_kernel(biased, (q, k, v, 0.5 ** torch.arange(1, HEADS + 1).to(dtype)))
    theirs = torch.arange(KEYS).div(20, rounding_mode="floor").expand(2, -1).contiguous()
    second = one_kernel(documents, (q, k, v, theirs[:, :queries].contiguous(), theirs))
    assert first.groups[0].kernel.source != second.groups[0].kernel.source


def quantised(queries: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Packed keys and values, with new ones in full precision behind them."""
    q, k, v, _ = drawn_to(queries, torch.float32)
    packed = []
    for values in (k, v):
        scale, low = grid(values, BITS, GROUP)
        packed += [pack(encode(values, scale, low, BITS, GROUP), BITS), scale.to(dtype), low.to(dtype)]
    new = drawn(dtype, (2, KV, queries, SIZE), (2, KV, queries, SIZE))
    lengths = torch.tensor([3, KEYS])
    return (q.to(dtype), *packed, *new, lengths)


def over_packed(
    q: Tensor,
    k: Tensor,
    ks: Tensor,
    kl: Tensor,
    v: Tensor,
    vs: Tensor,
    vl: Tensor,
    nk: Tensor,
    nv: Tensor,
    held: Tensor,
) -> Tensor:
    """Attention over a quantised cache and the tokens behind it, of which each sees those before it."""
    keys = torch.cat([dequantise(k, ks, kl, BITS, GROUP, SIZE), nk], 2)
    values = torch.cat([dequantise(v, vs, vl, BITS, GROUP, SIZE), nv], 2)
    columns = torch.arange(KEYS + q.shape[2], device=q.device)
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    old = (columns < held[:, None])[:, None, None]
    new = ((columns >= KEYS) & (columns - KEYS <= rows))[None, None]
    return attention(q, keys, values, old | new, None, 0.2, False, None, None)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_quantised_caches_are_unpacked_in_the_loads(queries: int, dtype: torch.dtype) -> None:
    made = one_kernel(over_packed, quantised(queries, dtype))
    assert made.groups[0].ops.count("dequantise") == 2


@pytest.mark.parametrize("queries", [1, 3])
def test_a_gate_behind_a_cache(queries: int) -> None:
    """The cache is written in its place although only the kernel itself reads the attention."""
    q, keys, values, gate = drawn_to(queries, torch.float32)
    k, v = keys[:, :, :queries] * 2, values[:, :, :queries] * 3
    lengths = torch.tensor([3, KEYS - queries])

    def function(
        q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, spans: Tensor, gate: Tensor
    ) -> Tensor:
        places = lengths[:, None] + torch.arange(queries)
        y = cached_attention(q, k, v, keys, values, lengths, places, spans, None, None, 0.2, None, None)
        return y.transpose(1, 2).reshape(2, queries, HEADS * SIZE) * torch.sigmoid(gate)

    inputs = (q, k, v, keys, values, lengths, straight(queries), gate)
    made = lower_graph(trace(function, *inputs), "cpu", Options(interpret=True))
    assert any("sigmoid" in group.ops and "cached_attention" in group.ops for group in made.groups)
    mine = [x.clone() for x in inputs]
    wanted = reference(function, inputs)[0]
    assert close(made(list(mine)), wanted)
    function(*inputs)
    assert torch.equal(mine[3], keys)
    assert torch.equal(mine[4], values)


@pytest.mark.parametrize("target", TARGETS)
def test_decoding_over_packed_entries_does_not_spill(target: str) -> None:
    made = lower_graph(trace(over_packed, *quantised(1, torch.bfloat16)), "cpu", Options(interpret=True))
    for used in compile_ahead(made.groups[0].kernel, target):
        assert used.spilled == 0, used


def test_what_others_read_is_not_taken_in() -> None:
    """A mask that two attentions share is computed once; keys that are computed are stored once."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        mask = bias.exp() * 2
        first = attention(q, k.exp(), v, mask, None, 0.2, False, None, None)
        return attention(first, k, v, mask, None, 0.2, False, None, None)  # type: ignore[no-any-return]

    q, k, v, _ = drawn_to(41, torch.float32)
    inputs = (q, k, v, torch.randn(1, 1, 41, KEYS))
    made = lower_graph(trace(function, *inputs), "cpu", Options(interpret=True))
    assert [group.kernel.template for group in made.groups].count("attention") == 2
    assert len(made.groups) == 4
    torch.testing.assert_close(made(list(inputs)), function(*inputs), rtol=1e-4, atol=1e-4)
