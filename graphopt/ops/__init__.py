"""Op contracts: the few operations that graphopt adds to aten, each with an eager reference that defines its meaning."""

from graphopt.ops.admitted import admit_tokens, admitted_attention, admitting_attention
from graphopt.ops.bounded import bounded_attention, heavy_weights, held_attention
from graphopt.ops.cached import Slots, attend, cached_attention
from graphopt.ops.library import attention, attention_mask, register, rms_norm, rotary
from graphopt.ops.packed import packed_attention, quantised_attention
from graphopt.ops.quantised import dequantise, from_palette, from_sparse
from graphopt.ops.tokens import (
    merge_tokens,
    merge_windows,
    pair_scores,
    put_tokens,
    random_scores,
    received_attention,
    similarity_scores,
    take_tokens,
    token_index,
    top_tokens,
    window_scores,
)

__all__ = [
    "Slots",
    "admit_tokens",
    "admitted_attention",
    "admitting_attention",
    "attend",
    "attention",
    "attention_mask",
    "bounded_attention",
    "cached_attention",
    "dequantise",
    "from_palette",
    "from_sparse",
    "heavy_weights",
    "held_attention",
    "merge_tokens",
    "merge_windows",
    "packed_attention",
    "pair_scores",
    "put_tokens",
    "quantised_attention",
    "random_scores",
    "received_attention",
    "register",
    "rms_norm",
    "rotary",
    "similarity_scores",
    "take_tokens",
    "token_index",
    "top_tokens",
    "window_scores",
]
