"""Draw docs/before_after.svg from two programs: every layer's query heads, KV heads and feed-forward width."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import graphopt
from graphopt.cost import cost
from graphopt.views import Views

OUT = Path(__file__).resolve().parent / "before_after.svg"
ROW, LEFT, WIDE = 30, 24, 300
INK, QUERY, KEYS, NEURONS, GONE = "#1f2933", "#3b6ea5", "#d9822b", "#6b9080", "#9aa5b1"


def column(title: str, x: int, program: Any, layers: int, neurons: int, perplexity: float | None) -> list[str]:
    """One model as rows of bars; rows of `layers` that it does not have are marked as gone."""
    views = Views(program)
    counted = cost(program).at(B=1, S=512)
    figures = (
        f"{counted['parameters'] / 1e6:.2f} M parameters, {counted['kv_bytes'] / 1024:,.0f} KiB cache at 512 tokens"
    )
    quality = f", perplexity {perplexity:.2f}" if perplexity is not None else ""
    parts = [
        f'<text x="{x}" y="26" font-size="16" font-weight="600">{title}</text>',
        f'<text x="{x}" y="46" font-size="12">{figures}{quality}</text>',
    ]
    for row in range(layers):
        y = 64 + row * ROW
        if row >= len(views.blocks):
            parts.append(f'<text x="{x}" y="{y + 15}" font-size="12" fill="{GONE}">layer removed</text>')
            continue
        block = views.blocks[row]
        attention, feed_forward = block.attentions[0], block.feed_forwards[0]
        for i in range(attention.heads):
            parts.append(f'<rect x="{x + i * 11}" y="{y}" width="9" height="9" rx="2" fill="{QUERY}"/>')
        for i in range(attention.kv_heads):
            parts.append(f'<rect x="{x + i * 11}" y="{y + 11}" width="9" height="9" rx="2" fill="{KEYS}"/>')
        width = (WIDE - 110) * feed_forward.neurons / neurons
        parts.append(f'<rect x="{x + 100}" y="{y}" width="{width:.1f}" height="20" rx="3" fill="{NEURONS}"/>')
        parts.append(
            f'<text x="{x + 106}" y="{y + 14}" font-size="11" fill="white">{feed_forward.neurons} neurons</text>'
        )
    return parts


def main() -> None:
    """Compare two checkpoints; perplexities come from the second one's trail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before")
    parser.add_argument("after")
    arguments = parser.parse_args()
    before, after = graphopt.load(arguments.before), graphopt.load(arguments.after)
    views = Views(before)
    layers, neurons = len(views.blocks), max(f.neurons for f in views.feed_forwards)
    measured = [step.before.get("perplexity") for step in after.trail[:1]] + [
        step.after.get("perplexity") for step in after.trail[-1:]
    ]
    first, last = measured if len(measured) == 2 else (None, None)
    height = 64 + layers * ROW + 34
    legend = 64 + layers * ROW + 14
    body = [
        *column("before", LEFT, before, layers, neurons, first),
        *column("after", LEFT + WIDE + 130, after, layers, neurons, last),
        f'<rect x="{LEFT}" y="{legend - 9}" width="9" height="9" rx="2" fill="{QUERY}"/>',
        f'<text x="{LEFT + 14}" y="{legend}" font-size="12">query head</text>',
        f'<rect x="{LEFT + 100}" y="{legend - 9}" width="9" height="9" rx="2" fill="{KEYS}"/>',
        f'<text x="{LEFT + 114}" y="{legend}" font-size="12">KV head</text>',
        f'<rect x="{LEFT + 190}" y="{legend - 9}" width="9" height="9" rx="2" fill="{NEURONS}"/>',
        f'<text x="{LEFT + 204}" y="{legend}" font-size="12">feed-forward</text>',
    ]
    OUT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDE + 270}" height="{height}" fill="{INK}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )
    print(OUT)


if __name__ == "__main__":
    main()
