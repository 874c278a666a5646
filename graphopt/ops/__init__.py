"""Op contracts: the few operations that graphopt adds to aten, each with an eager reference that defines its meaning."""

from graphopt.ops.cached import Slots, attend, cached_attention
from graphopt.ops.library import attention, attention_mask, register, rms_norm, rotary

__all__ = ["Slots", "attend", "attention", "attention_mask", "cached_attention", "register", "rms_norm", "rotary"]
