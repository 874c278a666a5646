"""The edit that adds draft heads, and where in a graph they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Input
from graphopt.ir.reach import ancestors
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.weights import Affine, Const
from graphopt.passkit.edits import Edit
from graphopt.views import Views, size_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Names of nodes and weights: the product that gives logits, what it reads, and the token embedding's table."""

    product: str
    hidden: str
    result: str
    width: int
    table: str | None = None


def find_place(views: Views, *, embeds: bool) -> Place | str:
    """Where heads go; the reason when the graph has no such place."""
    program = views.program
    if any(name == "hidden" or name.startswith("heads.") for name in program.entry.outputs):
        return "the program has draft heads already"
    if not any(spec.role == "tokens" for spec in program.entry.inputs):
        return "the program reads no tokens, so it has none to draft"
    result = program.output_nodes[0]
    if result.meta["val"].dim() != 3:
        return f"the first result is {list(result.meta['val'].shape)}, not logits [B, S, V]"
    product = _last_product(views, result)
    if product is None:
        return "the logits are not the result of one matrix product over the hidden state, followed by plain arithmetic"
    linear = views.labels.linears[product]
    width = int(linear.x.meta["val"].shape[-1])
    if not embeds:
        return Place(product.name, linear.x.name, result.name, width)
    stream = views.stream
    table = stream[0].args[0] if stream and stream[0].target is aten.embedding.default else None
    if not isinstance(table, fx.Node) or "weight" not in table.meta:
        return "the tokens are not embedded by one table"
    if int(table.meta["val"].shape[1]) != width:
        return f"the embedding is {table.meta['val'].shape[1]} wide and the hidden state {width}"
    return Place(product.name, linear.x.name, result.name, width, table.meta["weight"])


def _last_product(views: Views, result: fx.Node) -> fx.Node | None:
    """The product of a weight with a vocabulary-sized axis, through which all of the logits pass."""
    node, linears = result, views.labels.linears
    vocabulary = int(result.meta["val"].shape[-1])
    while node not in linears:
        sources = [n for n in node.all_input_nodes if _is_logits(n, vocabulary)]
        if len(sources) != 1:
            return None
        node = sources[0]
    linear = linears[node]
    wide = size_of(views.labels.weight_axes[linear.weight][linear.out_axis]) == vocabulary
    return node if wide and linear.x.meta["val"].dim() == 3 else None


def _is_logits(node: fx.Node, vocabulary: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[-1] == vocabulary


@dataclass(frozen=True, eq=False)
class Heads(Edit):
    """`count` heads of `layers` residual blocks behind the hidden state, with an output matrix of their `own` or not."""

    kind: str
    count: int
    layers: int
    own: bool
    place: Place

    @property
    def candidate(self) -> str:
        """All heads are one candidate."""
        return "model:heads"

    def describe(self) -> str:
        """How many heads of which kind."""
        output = "outputs of their own" if self.own else "the program's output"
        return f"add {self.count} {self.kind} heads with {output} behind %{self.place.hidden}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "edit": "heads",
            "kind": self.kind,
            "heads": self.count,
            "layers": self.layers,
            "own_output": self.own,
            "hidden": self.place.hidden,
        }

    def apply(self, rewriter: Rewriter, views: Views) -> None:
        """Add blocks, outputs and results."""
        hidden = rewriter.node(self.place.hidden)
        rewriter.add_output("hidden", hidden)
        embedded = self._embeddings(rewriter)
        for k in range(1, self.count + 1):
            state, anchor = hidden, next(iter(reversed(rewriter.graph.nodes)))
            if embedded:
                state = self._fold(rewriter, f"heads.{k}", (hidden, *embedded[:k]), anchor)
            for block in range(1 if embedded else 0, self.layers):
                state = self._block(rewriter, f"heads.{k}.{block}", state, state, self.place.width, anchor)
            rewriter.add_output(f"heads.{k}", self._output(rewriter, f"heads.{k}.output", state, anchor))

    def emulate(self, rewriter: Rewriter, views: Views) -> None:
        """What untrained heads must give: the logits of the next token."""
        rewriter.add_output("hidden", rewriter.node(self.place.hidden))
        for k in range(1, self.count + 1):
            rewriter.add_output(f"heads.{k}", rewriter.node(self.place.result))

    def _embeddings(self, rewriter: Rewriter) -> list[fx.Node]:
        """Embeddings of the tokens 1 to K behind each position, for heads that read them."""
        if self.place.table is None:
            return []
        tokens = next(spec for spec in rewriter.program.entry.inputs if spec.role == "tokens")
        ahead = rewriter.add_input(Input("ahead", (*tokens.shape[:2], self.count), torch.int64, "ahead"))
        anchor = next(iter(reversed(rewriter.graph.nodes)))
        table = rewriter.weight_node(self.place.table)
        picked = [rewriter.call(aten.select.int, ahead, -1, k, before=anchor) for k in range(self.count)]
        return [rewriter.call(aten.embedding.default, table, token, before=anchor) for token in picked]

    def _fold(self, rewriter: Rewriter, name: str, parts: tuple[fx.Node, ...], anchor: fx.Node) -> fx.Node:
        """Hydra's first block: W2 z + SiLU(W1 z + b) of z = [h ; e_1 ; ...], where W2 takes h out of z at first."""
        width = self.place.width
        joined = rewriter.call(aten.cat.default, list(parts), -1, before=anchor)
        first = torch.zeros(width, width * len(parts))
        first[:, :width] = torch.eye(width)
        fold = self._weight(rewriter, f"{name}.fold.weight", first)
        folded = rewriter.call(aten.linear.default, joined, fold, before=anchor)
        return self._block(rewriter, f"{name}.0", joined, folded, width * len(parts), anchor)

    def _block(self, rewriter: Rewriter, name: str, x: fx.Node, skip: fx.Node, wide: int, anchor: fx.Node) -> fx.Node:
        """SiLU(W x + b) + skip with W and b zero."""
        weight = self._weight(rewriter, f"{name}.weight", torch.zeros(self.place.width, wide))
        bias = self._weight(rewriter, f"{name}.bias", torch.zeros(self.place.width))
        branch = rewriter.call(aten.linear.default, x, weight, bias, before=anchor)
        branch = rewriter.call(aten.silu.default, branch, before=anchor)
        return rewriter.call(aten.add.Tensor, skip, branch, before=anchor)

    def _weight(self, rewriter: Rewriter, name: str, value: torch.Tensor) -> fx.Node:
        kind = rewriter.program.dtype
        return rewriter.add_weight(name, Const(value.to(kind), kind))

    def _output(self, rewriter: Rewriter, name: str, state: fx.Node, anchor: fx.Node) -> fx.Node:
        """Logits from another state and, when heads own their outputs, by another matrix."""
        instead: dict[fx.Node, fx.Node] = {}
        if self.own:
            for source in rewriter.node(self.place.product).all_input_nodes:
                if "weight" in source.meta:
                    held = rewriter.weights[source.meta["weight"]].expr
                    own = f"{name}.{'weight' if len(held.shape) == 2 else 'bias'}"
                    instead[source] = rewriter.add_weight(own, Affine(held, 1.0))
        return repeat_tail(rewriter, self.place, instead, state, anchor)


def repeat_tail(
    rewriter: Rewriter, place: Place, instead: dict[fx.Node, fx.Node], state: fx.Node, anchor: fx.Node
) -> fx.Node:
    """What leads from the hidden state to the logits again, from `state`; other nodes may be read `instead`."""
    instead = {**instead, rewriter.node(place.hidden): state}
    product, result = rewriter.node(place.product), rewriter.node(place.result)
    after = {product}
    for node in rewriter.graph.nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    needed = ancestors([result])
    copy = product
    # Scaling and capping of the logits come with the product.
    for node in [node for node in rewriter.graph.nodes if node in after and node in needed]:
        with rewriter.graph.inserting_before(anchor):
            copy = rewriter.graph.node_copy(node, lambda n: instead.get(n, n))
        copy.meta = {key: value for key, value in node.meta.items() if key == "path"} | {"by": rewriter.by}
        instead[node] = copy
    return copy
