"""Whole banks of experts, run expert by expert: what a graph computes for each row of a choice, with those rows together.

From the first to the last product with chosen matrices a graph works row by row: products, activations, biases, what a
choice counts. That part becomes a body that runs once for each chosen expert on the rows that chose it: rows are gathered
once and added to their tokens once, what is between stays small, and a row that counts 0 is not computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.ir.grouped import Groups, choice_of, group, products_in_order

aten = torch.ops.aten
_ALONG_ONE = {aten.squeeze.dim, aten.chunk.default, aten.slice.Tensor, aten.split.Tensor, aten.unsqueeze.default}

# Elements that the rows of all experts may have to be worked on together: fewer ops, and they still fit into caches.
TOGETHER = 1 << 19


class ByExpert(torch.nn.Module):  # type: ignore[misc]
    """A part of a graph as `rows`, a body for the rows of one expert, and as `whole`, what a compiler sees.

    Called with groups, `banks` tensors `[E, ...]` and tensors with a row for each choice or, where `repeats` says for how
    many, for each token. Results have a row for each choice; with `chosen` they are sums over as many choices of a token.
    """

    def __init__(
        self, rows: fx.GraphModule, whole: fx.GraphModule, banks: int, repeats: tuple[int, ...], chosen: int | None
    ) -> None:
        super().__init__()
        self.rows, self.whole = rows, whole
        self.banks, self.repeats, self.chosen = banks, repeats, chosen or 1

    def turned(self, number: int) -> bool:
        """Whether a bank is only read as matrices `[out, in]` of products, which are faster stored by columns."""
        placeholders = [node for node in self.rows.graph.nodes if node.op == "placeholder"]
        return all(user.target is product and user.args[2] is True for user in placeholders[number].users)

    def forward(self, groups: Groups, *values: Any) -> tuple[torch.Tensor, ...]:
        """The results of the part."""
        if groups.spans is None:
            found: tuple[torch.Tensor, ...] = self.whole(groups.index, *values)
            return found
        # Where no choice counts, one that counts 0 says what shape results have.
        spans = groups.spans or [(0, 0, min(1, len(groups.order)))]
        banks, sources = values[: self.banks], values[self.banks :]
        order = groups.order[: spans[-1][2]]
        places = {many: order // many if many > 1 else order for many in {*self.repeats, self.chosen}}
        if len(order) * sources[0][0].numel() <= TOGETHER:
            made = self.rows.forward(
                *((one, spans) if one.dim() == 3 else one[groups.index[order]] for one in banks),
                *(
                    # The row of a token on its own is not copied for each of its experts.
                    source.expand(len(order), *source.shape[1:])
                    if len(source) == 1
                    else source.index_select(0, places[many])
                    for source, many in zip(sources, self.repeats, strict=True)
                ),
            )
            if self.chosen == len(groups.index):
                return tuple(one.sum(0, keepdim=True) for one in made)
            return tuple(self._zeros(groups, one).index_add_(0, places[self.chosen], one) for one in made)
        results: tuple[torch.Tensor, ...] = ()
        for expert, start, end in spans:
            here = {many: place[start:end] for many, place in places.items()}
            # Not by calling the module: a call of one takes as long as an op.
            made = self.rows.forward(
                *(
                    (bank, [(expert, 0, end - start)]) if bank.dim() == 3 else bank.narrow(0, expert, 1)
                    for bank in banks
                ),
                *(source.index_select(0, here[many]) for source, many in zip(sources, self.repeats, strict=True)),
            )
            results = results or tuple(self._zeros(groups, one) for one in made)
            for result, one in zip(results, made, strict=True):
                result.index_add_(0, here[self.chosen], one)
        return results

    def _zeros(self, groups: Groups, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros(groups.index.shape[0] // self.chosen, *rows.shape[1:])


class PackedBank:
    """Matrices `[out, in]` of a bank in the layout of `multiply`, which gives the product of rows with one of them."""

    def __init__(self, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], matrices: list[torch.Tensor]):
        self.multiply, self.matrices = multiply, matrices

    def dim(self) -> int:
        """As of the bank `[E, out, in]`."""
        return 3


def product(rows: torch.Tensor, bank: tuple[Any, list[tuple[int, int, int]]], turned: bool) -> torch.Tensor:
    """Spans of rows `[N, in]` times the matrices of a bank; `turned` ones are `[out, in]`."""
    matrices, spans = bank
    if isinstance(matrices, PackedBank):
        made = [matrices.multiply(rows[start:end], matrices.matrices[expert]) for expert, start, end in spans]
        return made[0] if len(made) == 1 else torch.cat(made)
    return products_in_order(rows, matrices.mT if turned else matrices, spans)


def lower_banks(module: fx.GraphModule) -> None:
    """Let the parts of a graph that work on chosen rows run expert by expert; nodes within them are gone."""
    graph = module.graph
    found = [choice_of(node) for node in graph.nodes if node.target is aten.bmm.default]
    sizes = {choice[1].args[1][0]: choice[2] for choice in found if choice is not None}  # type: ignore[index]
    made: dict[tuple[Any, ...], fx.Node] = {}
    for number, (index, experts) in enumerate(sizes.items()):
        part = _Part(graph, index)  # type: ignore[arg-type]
        place = part.place()
        if place is None:
            continue
        key = (index, experts, part.share())
        module.add_submodule(f"by_expert_{number}", part.module())
        with graph.inserting_before(place):
            if key not in made:
                made[key] = graph.call_function(group, key)
            results = graph.call_module(f"by_expert_{number}", (made[key], *part.banks, *part.given))
            for i, old in enumerate(part.leaving):
                old.replace_all_uses_with(graph.call_function(operator.getitem, (results, i)))
        for node in reversed(part.all):
            if not node.users:
                graph.erase_node(node)


class _Part:
    """The nodes of a graph that are computed row by row for one choice `index`, and what goes in and out."""

    def __init__(self, graph: fx.Graph, index: fx.Node) -> None:
        self.graph, self.index = graph, index
        self.picked: dict[fx.Node, fx.Node] = {}
        self.inside: dict[fx.Node, None] = {}
        behind: set[fx.Node] = set()
        for node in graph.nodes:
            read = node.all_input_nodes
            if node.target is aten.index.Tensor and list(node.args[1]) == [index] and not behind & set(read):
                self.picked[node] = node.args[0]
            elif not behind & set(read) and self._by_row(node):
                self.inside[node] = None
            elif any(n in self.inside or n in behind for n in read):
                if node.target is aten.sym_size.int and node.args[0] in self.inside and node.args[1] == 0:
                    node.args = (index, 0)
                else:
                    behind.add(node)
        self.exits = [node for node in self.inside if any(user not in self.inside for user in node.users)]
        self.tail = _summed(self.exits[0]) if len(self.exits) == 1 else []
        self.leaving = self.tail[-1:] or self.exits
        read_by_rows = dict.fromkeys(n for one in self.inside for n in one.all_input_nodes if _tensor(n))
        self.banks = list(dict.fromkeys(self.picked[n] for n in read_by_rows if n in self.picked))
        sources = [n for n in read_by_rows if n not in self.inside and n not in self.picked]
        # Views of rows are made in the body, of what rows are made from.
        views = [
            n for n in sources if n.target is aten.unsqueeze.default and self._along_others(n) and self._rows(n.args[0])
        ]
        self.sources = list(dict.fromkeys(n.args[0] if n in views else n for n in sources))
        self.given = [n.args[0] if _repeats(n) > 1 else n for n in self.sources]
        self.body = [*views, *self.inside]
        self.all = [*self.given, *self.sources, *self.picked, *self.body, *self.tail]

    def _by_row(self, node: fx.Node) -> bool:
        """Whether each row of a node depends on the same row of what it reads, some of it inside, and on its expert."""
        target, read = node.target, node.all_input_nodes
        if target is aten.bmm.default:
            choice = choice_of(node)
            return choice is not None and choice[1] in self.picked and self._rows(node.args[1 - choice[0]])
        if not any(one in self.inside for one in read):
            return False
        if target is operator.getitem:
            return True
        if target in _ALONG_ONE:
            return self._along_others(node)
        if target is aten.reshape.default:
            return self._rows(node) and all(isinstance(size, int) for size in node.meta["val"].shape[1:])
        if isinstance(target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in target.tags or target is aten.to.dtype
        ):
            rank = node.meta["val"].dim()
            matrices = any(n in self.picked and n.meta["val"].dim() > 2 for n in read)
            rows = all((self._rows(n) or n in self.picked) and n.meta["val"].dim() == rank for n in read)
            return rows and not matrices
        return False

    def _along_others(self, node: fx.Node) -> bool:
        """Whether an op along one dimension leaves that of the rows alone."""
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        tensor = node if node.target is aten.unsqueeze.default else node.args[0]
        return given.get("dim", 0) not in (0, -tensor.meta["val"].dim())

    def _rows(self, node: Any) -> bool:
        """Whether a node has a row for each choice."""
        return _tensor(node) and bool(node.meta["val"].dim()) and str(node.meta["val"].shape[0]) == self._count

    @property
    def _count(self) -> str:
        return str(self.index.meta["val"].shape[0])

    def place(self) -> fx.Node | None:
        """The first reader of what leaves the part; None when there is no part or something is made too late for it."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        users = [user for node in self.leaving for user in node.users if user not in self.inside]
        if not users:
            return None
        first = min(users, key=order.__getitem__)
        inputs = [self.index, *self.banks, *self.given, *filter(None, [self.share()])]
        return first if all(order[node] < order[first] for node in inputs) else None

    def share(self) -> fx.Node | None:
        """What each choice counts, where what it makes is multiplied by that last of all and then added up."""
        last = self.exits[0] if self.tail else None
        if last is None or last.target is not aten.mul.Tensor:
            return None
        counts = [n for n in last.args if n not in self.inside and n not in self.picked and n.meta["val"].shape[1] == 1]
        return counts[0] if len(counts) == 1 else None

    def module(self) -> ByExpert:
        """The part on its own, in both forms."""
        repeats = tuple(_repeats(source) for source in self.sources)
        chosen = self.tail[0].meta["val"].shape[1] if self.tail else None
        return ByExpert(self._rows_of_one(), self._whole(), len(self.banks), repeats, chosen)

    def _whole(self) -> fx.GraphModule:
        graph = fx.Graph()
        made = {self.index: graph.placeholder("index")}
        made |= {node: graph.placeholder(f"bank_{i}") for i, node in enumerate(self.banks)}
        for i, (source, given) in enumerate(zip(self.sources, self.given, strict=True)):
            value = graph.placeholder(f"source_{i}")
            made[source] = value if source is given else graph.call_function(source.target, (value, *source.args[1:]))
        for node, bank in self.picked.items():
            if bank in made:
                made[node] = graph.call_function(node.target, (made[bank], [made[self.index]]))
        for node in [*self.body, *self.tail]:
            made[node] = _copied(graph, node, made)
        graph.output(tuple(made[node] for node in self.leaving))
        return fx.GraphModule(torch.nn.Module(), graph)

    def _rows_of_one(self) -> fx.GraphModule:
        graph = fx.Graph()
        banks = {node: graph.placeholder(f"bank_{i}") for i, node in enumerate(self.banks)}
        made = {source: graph.placeholder(f"source_{i}") for i, source in enumerate(self.sources)}
        made |= {node: banks[bank] for node, bank in self.picked.items() if bank in banks}
        for node in self.body:
            if node.target is not aten.bmm.default:
                made[node] = _copied(graph, node, made)
                continue
            side = choice_of(node)[0]  # type: ignore[index]
            along = 2 if side == 0 else 1
            x = _without(graph, made[node.args[1 - side]], along)  # type: ignore[index]
            matrix = made[node.args[side]]  # type: ignore[index]
            result = graph.call_function(product, (x, matrix, side == 0))
            made[node] = graph.call_function(aten.unsqueeze.default, (result, along))
        graph.output(tuple(made[node] for node in self.exits))
        graph.eliminate_dead_code()
        return fx.GraphModule(torch.nn.Module(), graph)


def _copied(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if node.target is aten.reshape.default:
        return graph.call_function(node.target, (made[node.args[0]], [-1, *node.meta["val"].shape[1:]]))  # type: ignore[index]
    if node.target is aten.squeeze.dim:
        return _without(graph, made[node.args[0]], node.args[1] % node.args[0].meta["val"].dim())
    return graph.node_copy(node, lambda one: made[one])


def _without(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    """A node without one dimension of size 1: what it was made of where that is where the dimension comes from."""
    if node.target is aten.unsqueeze.default and node.args[1] in (dim, dim - 3):
        return node.args[0]  # type: ignore[return-value]
    return graph.call_function(aten.squeeze.dim, (node, dim))


def _summed(last: fx.Node) -> list[fx.Node]:
    """The nodes that put the choices of each token together and add them up, if that is all that reads a node."""
    found = []
    node = last
    for target in (aten.reshape.default, aten.sum.dim_IntList):
        if len(node.users) != 1:
            return []
        (node,) = node.users
        if node.target is not target:
            return []
        found.append(node)
    taken, added = found
    shape, rows = taken.meta["val"].shape, last.meta["val"].shape
    fits = len(rows) == 2 and len(shape) == 3 and shape[2] == rows[1] and isinstance(shape[1], int)
    return found if fits and added.args[1:] in (([1],), ([-2],)) and not added.kwargs else []


def _repeats(node: fx.Node) -> int:
    """How often rows of a node stand one behind the other, as `repeat_interleave` made them."""
    same = node.target is aten.repeat_interleave.self_int and len(node.args) == 3 and node.args[2] == 0
    return int(node.args[1]) if same and isinstance(node.args[1], int) else 1  # type: ignore[arg-type]


def _tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)
