"""Products with chosen matrices of a bank, computed expert by expert: the fast lowering of a gather and a batched product.

A routed graph says bank[index] @ x: one matrix is copied for each row. The same products are made here with the rows of
each expert together, so that every matrix that is chosen is read once, none is copied, and what nobody chose costs nothing.
"""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten
# Choices up to which sorting them in Python takes less than the three ops.
_FEW = 16


class Groups(NamedTuple):
    """Rows by experts: the choice `[N]`, the rows in its order `[N]`, and (expert, first, last + 1) of each one chosen.

    Rows of no group come last in the order. `spans` is None under a compiler, which sees the gather and the batched
    product instead: spans depend on the data.
    """

    index: torch.Tensor
    order: torch.Tensor
    spans: list[tuple[int, int, int]] | None


def group(index: torch.Tensor, experts: int, share: torch.Tensor | None = None) -> Groups:
    """Groups of a choice `[N]` among experts; a choice whose share is 0 is in none, unless shares are trained."""
    if torch.compiler.is_compiling():
        return Groups(index, index, None)
    counted = index
    if share is not None and not (share.requires_grad and torch.is_grad_enabled()):
        counted = index.masked_fill(share.reshape(-1) == 0, experts)
    if len(counted) <= _FEW and counted.device.type == "cpu":
        numbers = counted.tolist()
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        runs = [(expert, len(list(same))) for expert, same in groupby(numbers[row] for row in order)]
        ends = list(accumulate(count for _, count in runs))
        spans = [(e, end - n, end) for (e, n), end in zip(runs, ends, strict=True) if e < experts]
        return Groups(index, torch.tensor(order, dtype=torch.int64), spans)
    counts = torch.bincount(counted, minlength=experts).tolist()[:experts]
    ends = list(accumulate(counts))
    spans = [(e, end - count, end) for e, (count, end) in enumerate(zip(counts, ends, strict=True)) if count]
    return Groups(index, torch.argsort(counted, stable=True), spans)


def matrix_times_rows(bank: torch.Tensor, groups: Groups, x: torch.Tensor) -> torch.Tensor:
    """bank[index] @ x for a bank `[E, out, in]` and x `[N, in, 1]`: `[N, out, 1]`."""
    if groups.spans is None:
        return torch.bmm(bank[groups.index], x)
    return _products(bank.mT, groups.order, groups.spans, x.squeeze(-1)).unsqueeze(-1)


def rows_times_matrix(x: torch.Tensor, bank: torch.Tensor, groups: Groups) -> torch.Tensor:
    """x @ bank[index] for x `[N, 1, in]` and a bank `[E, in, out]`: `[N, 1, out]`."""
    if groups.spans is None:
        return torch.bmm(x, bank[groups.index])
    return _products(bank, groups.order, groups.spans, x.squeeze(1)).unsqueeze(1)


def _products(
    bank: torch.Tensor, order: torch.Tensor, spans: list[tuple[int, int, int]], x: torch.Tensor
) -> torch.Tensor:
    made = products_in_order(x[order], bank, spans)
    return torch.empty_like(made).index_copy(0, order, made)


def products_in_order(rows: torch.Tensor, bank: torch.Tensor, spans: list[tuple[int, int, int]]) -> torch.Tensor:
    """Rows `[N, in]` that lie as the spans say, each span times its matrix of a bank `[E, in, out]`: `[N, out]`."""
    made = []
    for (expert, start, end), several in _neighbours(spans):
        if several > 1:
            # One call for matrices that lie side by side: 10 us for eight of 192 x 128, where eight calls take 23.
            made.append(torch.bmm(rows[start:end].unsqueeze(1), bank.narrow(0, expert, several)).squeeze(1))
        else:
            made.append(torch.mm(rows[start:end], bank.select(0, expert)))
    return made[0] if len(made) == 1 else torch.cat(made)


def _neighbours(spans: list[tuple[int, int, int]]) -> list[tuple[tuple[int, int, int], int]]:
    """Spans with how many experts each is for: neighbours that have one row each are one."""
    found: list[tuple[tuple[int, int, int], int]] = []
    for expert, start, end in spans:
        if found and end - start == 1:
            (first, begin, until), several = found[-1]
            if expert == first + several and until - begin == several:
                found[-1] = ((first, begin, end), several + 1)
                continue
        found.append(((expert, start, end), 1))
    return found


def lower_choices(graph: fx.Graph) -> None:
    """Let batched products with chosen matrices run expert by expert; nodes keep their names and their results.

    Rows are put in order once for each choice, which all products that read it share. Matrices that something else reads,
    too, and products of more than one column stay as they are.
    """
    made: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.bmm.default:
            continue
        found = choice_of(node)
        if found is None:
            continue
        side, gathered, size = found
        bank, (index,) = gathered.args
        key = (index, size)
        if key not in made:
            with graph.inserting_before(gathered):
                made[key] = graph.call_function(group, key)
        other = node.args[1 - side]
        node.target = matrix_times_rows if side == 0 else rows_times_matrix
        node.args = (bank, made[key], other) if side == 0 else (other, bank, made[key])
        if not gathered.users:
            graph.erase_node(gathered)


def choice_of(node: fx.Node) -> tuple[int, fx.Node, int] | None:
    """The side of a product on which matrices are chosen, the node that chooses them and the size of their bank."""
    for side in (0, 1):
        gathered, other = node.args[side], node.args[1 - side]
        if not isinstance(gathered, fx.Node) or gathered.target is not aten.index.Tensor or len(gathered.users) > 1:
            continue
        bank, index = gathered.args[:2]
        value, column = _value(bank), _value(other)
        if value is None or column is None or value.dim() != 3 or column.shape[2 if side == 0 else 1] != 1:
            continue
        if len(index) != 1 or not isinstance(index[0], fx.Node):  # type: ignore[arg-type,index]
            continue
        chosen, size = _value(index[0]), value.shape[0]  # type: ignore[index]
        if chosen is not None and chosen.dim() == 1 and chosen.dtype == torch.int64 and isinstance(size, int):
            return side, gathered, size
    return None


def _value(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None
