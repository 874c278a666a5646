"""`diff`: two programs compared, views first, then weights, then cost, then ops."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.cost import formula
from graphopt.ir.program import Program
from graphopt.ir.text import diff_text
from graphopt.report.describe import AttentionFacts, BlockFacts, Description, FeedForwardFacts, describe
from graphopt.report.page import Page, change, fold, size

_COSTS = ("path", "index", "parameters", "bytes", "flops", "kv_bytes")


def diff(
    before: Program, after: Program, *, graph: bool = False, names: tuple[str, str] | None = None
) -> dict[str, Any]:
    """How `after` differs from `before`, as data; blocks and weights are matched by their names.

    Weights are compared by shape and dtype, not by value. `graph` adds the node-by-node difference as text.
    """
    a, b = describe(before), describe(after)
    views, weights, ops = _views(a, b), _weights(before, after), _ops(before, after)
    found: dict[str, Any] = {
        "names": list(names or (before.origin.name, after.origin.name)),
        "model": _model(a, b),
        "views": views,
        "weights": weights,
        "cost": {
            "parameters": [a.cost.parameters, b.cost.parameters],
            "bytes": [a.cost.bytes, b.cost.bytes],
            "flops": [formula(a.cost.flops), formula(b.cost.flops)],
            "kv_bytes": [formula(a.cost.kv_bytes), formula(b.cost.kv_bytes)],
        },
        "ops": ops,
    }
    if graph:
        found["graph"] = diff_text(before, after)
    weights_differ = weights["changed"] or weights["new"] or weights["gone"]
    found["equal"] = not (found["model"] or any(views.values()) or weights_differ or ops or found.get("graph"))
    return found


def diff_page(before: Program, after: Program, *, graph: bool = False, names: tuple[str, str] | None = None) -> Page:
    """The same as a page."""
    found = diff(before, after, graph=graph, names=names)
    page = Page()
    same = "the same structure; values are not compared" if found["equal"] else ""
    page.title(" -> ".join(found["names"]), same)
    for name, (old, new) in found["model"].items():
        page.row(name, f"{old} -> {new}")
    views = found["views"]
    for each in views["changed"]:
        page.title(", ".join(fold(each["blocks"])))
        for name, (old, new) in each["changes"].items():
            page.row(name, f"{old} -> {new}")
    for word, style in (("removed", "red"), ("added", "green")):
        for name in fold(views[word]):
            page.lines.append((style, name, f": {word}"))
    _weights_page(page, found["weights"], views)
    page.title("cost")
    for name in ("parameters", "bytes"):
        old, new = found["cost"][name]
        shown = [size(old), size(new)] if name == "bytes" else [f"{old:,}", f"{new:,}"]
        more = change(old, new)
        page.row(name, f"{shown[0]} -> {shown[1]}  {more}" if more else f"{shown[0]}, the same")
    for name, key in (("FLOPs", "flops"), ("KV bytes", "kv_bytes")):
        old, new = found["cost"][key]
        page.row(name, f"{old} -> {new}" if old != new else f"{old}, the same")
    if found["ops"]:
        page.title("ops")
    for op, (old, new) in found["ops"].items():
        page.row(op, f"{old} -> {new}")
    if found.get("graph"):
        page.title("graph")
        for line in found["graph"].splitlines():
            page.lines.append(({"+": "green", "-": "red"}.get(line[:1], ""), line, ""))
    return page


def _model(a: Description, b: Description) -> dict[str, list[Any]]:
    def facts(d: Description) -> dict[str, Any]:
        return {
            "dtype": str(d.program.dtype).removeprefix("torch."),
            "blocks": len(d.blocks),
            "width": sorted({block.width for block in d.blocks}),
            "vocabulary": d.embedding and d.embedding.rows,
            "tied head": d.tied,
        }

    old, new = facts(a), facts(b)
    return {key: [old[key], new[key]] for key in old if old[key] != new[key]}


def _views(a: Description, b: Description) -> dict[str, list[Any]]:
    old, new = {block.path: block for block in a.blocks}, {block.path: block for block in b.blocks}
    groups: dict[str, dict[str, Any]] = {}
    for path in old:
        if path not in new:
            continue
        changes = _changes(_flat(old[path]), _flat(new[path]))
        if changes:
            groups.setdefault(repr(changes), {"blocks": [], "changes": changes})["blocks"].append(path)
    return {
        "changed": list(groups.values()),
        "removed": [path for path in old if path not in new],
        "added": [path for path in new if path not in old],
    }


def _flat(block: BlockFacts) -> dict[str, Any]:
    facts = {key: value for key, value in vars(block).items() if key not in (*_COSTS, "attentions", "feed_forwards")}
    views: tuple[AttentionFacts | FeedForwardFacts, ...] = (*block.attentions, *block.feed_forwards)
    for view in views:
        names = {key: f"{view.path} {key.replace('_', ' ').replace('kv ', 'KV ')}".strip() for key in vars(view)}
        facts |= {names[key]: value for key, value in vars(view).items() if key != "path"}
    return facts


def _changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys([*old, *new]))
    return {name: [_plain(old.get(name)), _plain(new.get(name))] for name in names if old.get(name) != new.get(name)}


def _plain(value: Any) -> Any:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else "none" if value is None else value


def _weights(before: Program, after: Program) -> dict[str, Any]:
    old = {name: weight for name, weight in before.weights.weights.items() if weight.kind != "constant"}
    new = {name: weight for name, weight in after.weights.weights.items() if weight.kind != "constant"}
    changed, kept = [], 0
    for name in old.keys() & new.keys():
        a, b = old[name].expr, new[name].expr
        if (a.shape, a.dtype) == (b.shape, b.dtype):
            kept += 1
    for name, weight in old.items():
        if name not in new:
            continue
        a, b = weight.expr, new[name].expr
        if a.shape != b.shape:
            changed.append({"name": name, "before": list(a.shape), "after": list(b.shape)})
        elif a.dtype != b.dtype:
            changed.append({"name": name, "before": str(a.dtype)[6:], "after": str(b.dtype)[6:]})
    return {
        "kept": kept,
        "changed": changed,
        "new": [{"name": name, "shape": list(new[name].expr.shape)} for name in new if name not in old],
        "gone": [{"name": name, "shape": list(old[name].expr.shape)} for name in old if name not in new],
    }


def _weights_page(page: Page, weights: dict[str, Any], views: dict[str, list[Any]]) -> None:
    page.title("weights", f"{weights['kept']:,} kept their shape")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in weights["changed"]:
        groups.setdefault(("yellow", "", f"{each['before']} -> {each['after']}"), []).append(each["name"])
    for word, style in (("new", "green"), ("gone", "red")):
        whole = views["added" if word == "new" else "removed"]
        for each in weights[word]:
            if any(each["name"].startswith(f"{block}.") for block in whole):
                continue
            groups.setdefault((style, f"{word} ", str(each["shape"])), []).append(each["name"])
    for (style, word, text), names in groups.items():
        for name in fold(names):
            page.row(f"{word}{name}", text, style=style)
    for word, key, style in (("new", "added", "green"), ("gone", "removed", "red")):
        inside = [each for each in weights[word] if any(each["name"].startswith(f"{b}.") for b in views[key])]
        if inside:
            blocks = ", ".join(f"{name}.*" for name in fold(views[key]))
            page.row(f"{word} {blocks}", f"{len(inside):,} weights", style=style)


def _ops(before: Program, after: Program) -> dict[str, list[int]]:
    old, new = (Counter(op_names(program)) for program in (before, after))
    return {op: [old[op], new[op]] for op in sorted(old | new) if old[op] != new[op]}


def op_names(program: Program) -> list[str]:
    """The op of every call, as in `aten.linear.default`; Python's own by their names."""
    calls = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    return [str(n.target) if hasattr(n.target, "overloadpacket") else str(n.target.__name__) for n in calls]
