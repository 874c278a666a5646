"""Facts: what a pass may assume of a program and what it changes, checked before any model loads."""

from __future__ import annotations

from enum import StrEnum


class Fact(StrEnum):
    """A closed list of things that can be true of a program."""

    CAPTURED = "captured"
    KV_CACHED = "kv_cached"
    QUANTIZED = "quantized"
    LOWERED = "lowered"
    SPECULATIVE = "speculative"
    TOKENS_DROPPED = "tokens_dropped"
    UNTRAINED = "untrained"


class Effect(StrEnum):
    """What a pass promises (and is held to)."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    LOSSLESS_DECODE = "lossless-decode"
    UNTRAINED = "untrained"
