"""Which layers stay, as arithmetic on counts alone."""

from __future__ import annotations


def reserved(layers: int, speedup: float, spacing: str = "upstream") -> tuple[int, ...]:
    """Layers that run for a target speed-up: max(2, int(L / s)) of L, the first and the last among them.

    `upstream` steps by int(L / (n - 1)) and lets the last gap differ (Unified Layer Skipping, arXiv 2404.06954, as its
    code does it); `linspace` rounds evenly spread positions. Raises ValueError where upstream divides by zero.
    """
    count = int(layers / speedup)
    if count >= layers:
        return tuple(range(layers))
    if spacing == "linspace":
        count = max(2, count)
        return tuple((2 * i * (layers - 1) + count - 1) // (2 * (count - 1)) for i in range(count))
    if count < 2:
        raise ValueError(f"{layers} layers / {speedup:g} leaves {count}, fewer than the first and the last")
    step = layers // (count - 1)
    inner = [i for i in range(step, layers - 1, step)][: count - 2]
    return (0, *inner, layers - 1)


def evenly(layers: int, remove: int) -> tuple[int, ...]:
    """Layers to remove, spread evenly between the first and the last."""
    keep = layers - remove
    kept = {(2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)}
    return tuple(i for i in range(layers) if i not in kept)
