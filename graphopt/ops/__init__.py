"""Op contracts: the few operations that graphopt adds to aten, each with an eager reference that defines its meaning."""

from graphopt.ops.bounded import bounded_attention, heavy_weights, held_attention
from graphopt.ops.cached import Slots, attend, cached_attention
from graphopt.ops.library import attention, attention_mask, register, rms_norm, rotary
from graphopt.ops.quantised import dequantise

__all__ = [
    "Slots",
    "attend",
    "attention",
    "attention_mask",
    "bounded_attention",
    "cached_attention",
    "dequantise",
    "heavy_weights",
    "held_attention",
    "register",
    "rms_norm",
    "rotary",
]
