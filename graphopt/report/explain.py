"""`explain`: a program as blocks, equal ones folded, with formulae in its dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graphopt.cost import formula
from graphopt.ir.program import Program
from graphopt.report.describe import AttentionFacts, BlockFacts, Description, ExpertFacts, FeedForwardFacts, describe
from graphopt.report.page import Page, fold, size
from graphopt.report.run_report import figure, proof


def explain(program: Program) -> Page:
    """A page about a program: header, embedding, folded blocks, head, totals, declines and trail."""
    described = describe(program)
    page = Page()
    _header(page, described)
    for blocks in _folded(described.blocks):
        _blocks(page, blocks, learnt=described.positions is not None)
    _removed(page, described)
    _end(page, described)
    return page


def explain_json(program: Program) -> dict[str, Any]:
    """The same as plain data; formulae are text that sympy reads."""
    described = describe(program)
    costs = described.cost.to_json()
    return {
        "name": program.origin.name,
        "architecture": program.origin.architecture,
        "dtype": _dtype(program.dtype),
        "dims": {dim.name: [dim.low, dim.high] for dim in program.dims},
        "inputs": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": _dtype(spec.dtype), "role": spec.role}
            for spec in program.entry.inputs
        ],
        "embedding": described.embedding and described.embedding.to_json(),
        "positions": described.positions and described.positions.to_json(),
        "head": described.head and {**described.head.to_json(), "tied": described.tied},
        "final_norm": described.final_norm,
        "blocks": [block.to_json() for block in described.blocks],
        "removed": [dict(each) for each in described.removed],
        "cost": {key: costs[key] for key in ("parameters", "bytes", "flops", "kv_bytes", "kv_bytes_per_token")},
        "uncounted": costs["uncounted"],
        "notes": costs["notes"],
        "unseen": [dict(each) for each in described.unseen],
        "trail": [
            {
                "step": applied.step,
                "place": applied.place,
                "effect": applied.effect,
                "edits": len(applied.edits),
                "declines": [dict(decline) for decline in applied.declines],
                "certificate": dict(applied.certificate),
                "before": dict(applied.before),
                "after": dict(applied.after),
            }
            for applied in program.trail
        ],
    }


def _header(page: Page, described: Description) -> None:
    program = described.program
    architecture = f"({program.origin.architecture})" if program.origin.architecture else ""
    page.title(program.origin.name, architecture)
    page.row("parameters", f"{described.cost.parameters:,}  ({size(described.cost.bytes)} in {_dtype(program.dtype)})")
    for spec in program.entry.inputs:
        page.row("input", f"{spec.name} {_dtype(spec.dtype)}[{', '.join(map(str, spec.shape))}]")
    page.row("dims", ", ".join(f"{dim.name} {dim.low:,}..{dim.high:,}" for dim in program.dims))
    if described.embedding is not None:
        tied = ", tied to the head" if described.tied else ""
        page.row("embedding", f"{described.embedding.rows:,} x {described.embedding.width:,}{tied}")
    if described.positions is not None:
        page.row("positions", f"learnt, {described.positions.rows:,} x {described.positions.width:,}")


def _folded(blocks: tuple[BlockFacts, ...]) -> list[list[BlockFacts]]:
    groups: dict[tuple[Any, ...], list[BlockFacts]] = {}
    for block in blocks:
        groups.setdefault(block.signature(), []).append(block)
    return list(groups.values())


def _blocks(page: Page, blocks: list[BlockFacts], *, learnt: bool) -> None:
    first = blocks[0]
    each = f"{len(blocks)} blocks, each" if len(blocks) > 1 else "1 block"
    page.title(", ".join(fold(block.path for block in blocks)), each)
    for i, attention in enumerate(first.attentions):
        page.row(_label("attention", (b.attentions[i].path for b in blocks)), _attention(attention, learnt))
    for i, found in enumerate(first.feed_forwards):
        page.row(_label("feed forward", (b.feed_forwards[i].path for b in blocks)), _feed_forward(found, first.width))
    for i, experts in enumerate(first.experts):
        page.row(_label("experts", (b.experts[i].path for b in blocks)), _experts(experts, first.width))
    for i, mixer in enumerate(first.mixers):
        page.row(_label("mixer", (b.mixers[i].path for b in blocks)), f"{_MIXERS[mixer.kind]}, left alone")
    parts = (
        ("attention", (*first.attentions, *first.mixers)),
        ("feed forward", (*first.feed_forwards, *first.experts)),
    )
    for kind, found_views in parts:
        if not found_views:
            page.row(kind, "none", style="yellow")
    parallel = ", attention and feed-forward in parallel" if "parallel" in first.layout else ""
    page.row("norm", (f"{first.norm}, {first.place}" if first.place != "none" else "none") + parallel)
    page.row("parameters", f"{first.parameters:,}  ({size(first.bytes)})")
    page.row("FLOPs", formula(first.flops))
    page.row("KV bytes", formula(first.kv_bytes))


def _label(kind: str, paths: Iterable[str]) -> str:
    """Where a part is in each of some blocks; what it is where it is the block itself."""
    return ", ".join(fold(path or kind for path in paths))


def _attention(facts: AttentionFacts, learnt: bool) -> str:
    kind = "MHA" if facts.kv_heads == facts.heads else "MQA" if facts.kv_heads == 1 else "GQA"
    words = [f"{_many(facts.heads, 'head')} x {facts.head_dim}", f"{_many(facts.kv_heads, 'KV head')} ({kind})"]
    if facts.value_dim != facts.head_dim:
        words.append(f"values of {facts.value_dim}")
    if facts.positions == "bias":
        words.append("positions by a bias a head")
    elif facts.positions != "none":
        words.append(facts.positions)
    elif not learnt:
        words.append("no positions")
    words.append("causal" if facts.causal else "not causal")
    if facts.window is not None:
        words.append(f"window {facts.window:,}")
    if facts.softcap is not None:
        words.append(f"softcap {facts.softcap:g}")
    for here, word in ((facts.sinks, "sinks"), (facts.qk_norm, "q and k normed"), (facts.cross, "cross")):
        words += [word] if here else []
    words += ["packed qkv"] if facts.packed else []
    return ", ".join([*words, _bias(facts.biases, 4)])


def _feed_forward(facts: FeedForwardFacts, width: int) -> str:
    gated = "gated " if facts.gated else ""
    bias = _bias(facts.biases, 3 if facts.gated else 2)
    return f"{gated}{facts.activation}, {width:,} -> {facts.neurons:,} -> {width:,}, {bias}"


def _experts(facts: ExpertFacts, width: int) -> str:
    gated = "gated " if facts.gated else ""
    chosen = f"{facts.top_k} a token" if facts.top_k is not None else "all for every token"
    words = [f"{_many(facts.experts, 'expert')}, {chosen}", f"{gated}{facts.activation}"]
    words.append(f"{width:,} -> {facts.neurons:,} -> {width:,} each")
    words += [] if facts.routed else ["router not found"]
    words += [f"{facts.shared} shared"] if facts.shared else []
    return ", ".join(words)


_MIXERS = {
    "convolution": "mixes tokens by a convolution",
    "fourier": "mixes tokens by a Fourier transform",
    "projection": "mixes tokens by a product over them",
    "sampling": "mixes tokens by samples at places that it computes (deformable attention)",
    "softmax": "mixes tokens by a softmax that is no plain attention",
    "recurrence": "mixes tokens by a recurrence (state space or linear attention)",
}


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _bias(biases: tuple[str, ...], products: int) -> str:
    if not biases:
        return "no bias"
    return "biases" if len(biases) == products else f"bias of {', '.join(biases)}"


def _removed(page: Page, described: Description) -> None:
    steps: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for each in described.removed:
        key = (str(each["step"]), str(each["place"] or ""), tuple(each["parts"]))
        steps.setdefault(key, []).append(str(each["path"]))
    for (step, place, parts), paths in steps.items():
        what = f"sub-layers {', '.join(map(str, parts))} removed" if parts else "removed"
        page.title(", ".join(fold(paths)), f"{what} by {step}" + (f" ({place})" if place else ""))


def _end(page: Page, described: Description) -> None:
    found = described.cost
    page.title("end")
    if described.final_norm is not None:
        page.row("norm", described.final_norm)
    if described.head is not None:
        page.row("head", f"{described.head.width:,} -> {described.head.rows:,}" + (", tied" if described.tied else ""))
    page.title("total")
    page.row("parameters", f"{found.parameters:,}")
    page.row("FLOPs", formula(found.flops))
    page.row("KV bytes", formula(found.kv_bytes))
    for op, count in found.uncounted.items():
        page.row("uncounted", f"{count} x {op}: its FLOPs are not known and count zero", style="yellow")
    for note in found.notes:
        page.row("note", note, style="yellow")
    if described.unseen:
        page.title("not seen, or in part")
        reasons: dict[tuple[str, str], list[str]] = {}
        for each in described.unseen:
            what, _, path = each["what"].partition(" ")
            reasons.setdefault((what, each["reason"]), []).append(path)
        for (what, reason), paths in reasons.items():
            page.row(what, ": ".join(filter(None, (", ".join(fold(p for p in paths if p)), reason))), style="yellow")
    if described.program.trail:
        page.title("trail")
    for number, applied in enumerate(described.program.trail, 1):
        edits, declines = len(applied.edits), len(applied.declines)
        words = [applied.effect, f"{edits} edits", f"{declines} declined", proof(applied.certificate)]
        for key, name in (("parameters", "parameters"), ("perplexity", "perplexity")):
            if key in applied.before and key in applied.after:
                words.append(f"{name} {figure(key, applied.before[key])} -> {figure(key, applied.after[key])}")
        place = f" ({applied.place})" if applied.place else ""
        page.row(f"{number}", f"{applied.step}{place}: {', '.join(words)}")


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
