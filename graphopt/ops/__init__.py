"""Op contracts: the few operations that graphopt adds to aten, each with an eager reference that defines its meaning."""

from graphopt.ops.library import attention, attention_mask, register, rms_norm, rotary

__all__ = ["attention", "attention_mask", "register", "rms_norm", "rotary"]
