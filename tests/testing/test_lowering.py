"""Lowerings of ops against their meaning: right ones pass, planted wrong ones are caught, every op has a contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops import attention, attention_mask, cached_attention, rms_norm, rotary
from graphopt.ops.trees import straight
from graphopt.testing import LoweringBroken, check_lowering
from graphopt.testing.lowering import CONTRACTS, DTYPES

OPS = list(CONTRACTS)
# Their meaning is a policy over a whole text, and tests/cache holds their two forms to each other.
ELSEWHERE = {
    "admitted_attention", "admitting_attention", "bounded_attention", "held_attention", "heavy_weights",
    "packed_attention", "quantised_attention",
}  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_eager_kernel_is_what_the_op_means(op: Any) -> None:
    assert check_lowering(op, op) >= len(DTYPES) * 100


def test_every_op_has_a_contract() -> None:
    names = {name.removeprefix("graphopt::").split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("graphopt::")}  # fmt: skip
    assert names - ELSEWHERE == {op._schema.name.removeprefix("graphopt::") for op in OPS}
    with pytest.raises(KeyError):
        check_lowering(torch.ops.aten.add.Tensor, torch.add)


def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain_in_float: bool) -> torch.Tensor:
    """Another order of the same sums: the norm as a dot product."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(torch.einsum("...d,...d->...", wide, wide) / x.shape[-1] + eps)[..., None]
    if weight is None:
        return (wide * scale).to(x.dtype)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def vmapped_rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gain_in_float: bool) -> torch.Tensor:
    """Row by row under vmap."""
    rows = torch.vmap(lambda row: fused_rms_norm(row, weight, eps, gain_in_float))
    return rows(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, sinks: Any, scale: float, causal: bool,
    window: int | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """Query heads of one KV head as more queries of it, the mask computed apart."""
    if sinks is not None or softcap is not None:
        return attention(q, k, v, mask, sinks, scale, causal, window, softcap)  # type: ignore[no-any-return]
    padding = mask if mask is not None and mask.dim() == 2 else None
    seen = attention_mask(q, padding, q.shape[2], k.shape[2], causal, window)
    if mask is not None and padding is None:
        seen = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    (batch, heads), kv_heads = q.shape[:2], k.shape[1]
    groups = seen.expand(batch, heads, -1, -1).unflatten(1, (kv_heads, -1))
    y = F.scaled_dot_product_attention(
        q.unflatten(1, (kv_heads, -1)), k[:, :, None], v[:, :, None], attn_mask=groups, scale=scale
    )
    return y.flatten(1, 2)


@pytest.mark.parametrize(
    ("op", "kernel"),
    [(rms_norm, fused_rms_norm), (rms_norm, vmapped_rms_norm), (attention, grouped_attention)],
    ids=["fused", "vmapped", "grouped"],
)
def test_right_lowerings_pass(op: Any, kernel: Callable[..., torch.Tensor]) -> None:
    if kernel is vmapped_rms_norm:
        # vmap wants at least one row.
        check_lowering(op, lambda x, *rest: kernel(x, *rest) if x.numel() else op(x, *rest))
    else:
        check_lowering(op, kernel)


def changed(op: Any, position: int, change: Callable[[Any], Any]) -> Callable[..., torch.Tensor]:
    """A lowering that reads one argument wrongly."""

    def kernel(*arguments: Any) -> torch.Tensor:
        given = list(arguments)
        given[position] = change(given[position])
        return op(*given)  # type: ignore[no-any-return]

    return kernel


def interleaved_groups(*arguments: Any) -> torch.Tensor:
    """Query head h reads KV head h mod K."""
    q, k, v, *rest = arguments
    group = q.shape[1] // k.shape[1]
    return attention(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), *rest)  # type: ignore[no-any-return]


def half_precision_norm(x: torch.Tensor, weight: Any, eps: float, gain_in_float: bool) -> torch.Tensor:
    """Statistics in the storage dtype."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def one_slot_late(*arguments: Any) -> torch.Tensor:
    """Entries of a cache written one slot behind their place, where there is room."""
    keys, count = arguments[3], arguments[0].shape[2]
    kept = keys.clone()
    result = cached_attention(*arguments)
    start = int(arguments[5][0])
    if start + count < keys.shape[2]:
        keys.copy_(kept)
        keys[0, :, start + 1 : start + count + 1] = arguments[1][0]
    return result  # type: ignore[no-any-return]


WRONG: dict[str, tuple[Any, Callable[..., torch.Tensor], str]] = {
    "window off by one": (attention, changed(attention, 7, lambda w: w and w + 1), "off by"),
    "softcap forgotten": (attention, changed(attention, 8, lambda cap: None), "off by"),
    "sinks forgotten": (attention, changed(attention, 4, lambda sinks: None), "off by"),
    "padding forgotten": (attention, changed(attention, 3, lambda m: None if m is not None and m.dim() == 2 else m), "off by"),
    "wrong KV head": (attention, interleaved_groups, "off by"),
    "scale of another width": (attention, changed(attention, 5, lambda scale: scale * 1.01), "off by"),
    "contiguous inputs assumed": (
        attention,
        changed(attention, 0, lambda q: q.as_strided(q.shape, torch.empty(q.shape).stride())),
        "off by",
    ),
    "result in float32": (attention, lambda *a: attention(*a).float(), "and not"),
    "mask to the left": (attention_mask, changed(attention_mask, 4, lambda causal: not causal), "off by"),
    "statistics in half precision": (rms_norm, half_precision_norm, "off by"),
    "eps forgotten": (rms_norm, changed(rms_norm, 2, lambda eps: 0.0), "off by"),
    "halves for neighbours": (rotary, changed(rotary, 3, lambda near: False), "off by"),
    "turned the other way": (rotary, changed(rotary, 2, lambda sin: -sin), "off by"),
    "spans ignored": (cached_attention, changed(cached_attention, 7, lambda spans: straight(spans.shape[2])), "off by"),
    "lengths of the first row": (cached_attention, changed(cached_attention, 5, lambda n: n[:1].expand(len(n))), "off by|fit"),
    "written one slot late": (cached_attention, one_slot_late, "written into argument 3"),
    "no cache written": (
        cached_attention,
        lambda *a: cached_attention(*a[:3], a[3].clone(), a[4].clone(), *a[5:]),
        "written into argument",
    ),
    "crashes at length 1": (attention, changed(attention, 0, lambda q: q if q.shape[2] > 1 else q[0]), "Error"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lowerings_are_caught(name: str) -> None:
    op, kernel, words = WRONG[name]
    with pytest.raises(LoweringBroken, match=words) as caught:
        check_lowering(op, kernel)
    # The sample is small, and said in full.
    assert "\n  at " in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_dtype_can_be_left_out() -> None:
    assert check_lowering(rms_norm, half_precision_norm, dtypes=(torch.float32, torch.float64)) >= 200
    with pytest.raises(LoweringBroken, match="float16"):
        check_lowering(rms_norm, half_precision_norm, dtypes=(torch.float16,))
