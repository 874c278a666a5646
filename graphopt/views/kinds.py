"""The typed views: attentions, feed-forwards, expert banks, mixers, sub-layers and blocks, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt.views.atoms import Atom, Axis
from graphopt.views.routing import Linear, behind


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention: its core node, projections and head algebra.

    `q`, `k`, `v`, `o` are the matrix products next to the core (None when a side is not one); `kv_group` is the leaf that
    counts KV heads and `query_group` the leaf that counts query heads in each (None when there is 1).
    """

    path: str
    core: fx.Node
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None
    positions: str
    kv_group: Atom | None
    query_group: Atom | None
    output: Axis
    cross: bool = False


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward: up (and gate) into `neurons`, an activation, down."""

    path: str
    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    neurons: int
    neuron: Atom


@dataclass(frozen=True, eq=False)
class Experts:
    """One bank of experts: feed-forwards of one shape whose matrices are stacked, of which a router chooses for each token.

    `expert` numbers the experts in the bank, in the router and in its biases, within each of the groups that `expert_group`
    numbers where a router chooses groups first; `neuron` the neurons that each of them has. `index` and `share` `[..., k]`
    are the experts chosen for each token and what each of them counts, `weighted` `[tokens * k, hidden]` what each choice
    adds (None when the graph does not show them); `source` is what the bank reads.
    `gate` is `up` when one product makes both. `top_k` is None when every expert sees every token; `shared` are the
    feed-forwards of the same sub-layer that all tokens go through.
    """

    path: str
    router: Linear | None
    up: Linear
    gate: Linear | None
    down: Linear
    activation: str
    experts: int
    expert: Atom
    top_k: int | None
    neurons: int
    neuron: Atom
    shared: tuple[FeedForward, ...] = ()
    expert_group: Atom | None = None
    index: fx.Node | None = None
    share: fx.Node | None = None
    weighted: fx.Node | None = None

    @property
    def source(self) -> fx.Node:
        """The node that experts read, before its rows are repeated for each choice."""
        return behind(self.up.x)


@dataclass(frozen=True, eq=False)
class Mixer:
    """A sub-layer that mixes tokens without a softmax attention: it is recognised, shown and left alone.

    `kind` is `convolution`, `fourier`, `projection` (a product over the tokens), `sampling` (at places that are computed),
    `softmax` (an attention that is spelled in no way that is understood), or `recurrence` for state-space layers and linear
    attention.
    """

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class SubLayer:
    """What lies between two points of the residual stream: `exit` depends on `entry` and nothing else between.

    Where layers share keys or read the embedding again, it may depend on what earlier sub-layers made besides. `residual`
    says whether the exit is the entry plus a branch, up to norms and scales; `feeds` whether a feed-forward is inside.
    """

    kind: str
    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    residual: bool = True
    feeds: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """One layer: consecutive sub-layers and the parts in them; `stack` numbers the residual stream that it is on."""

    index: int
    path: str
    sublayers: tuple[SubLayer, ...]
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    experts: tuple[Experts, ...] = ()
    mixers: tuple[Mixer, ...] = ()
    stack: int = 0

    @property
    def entry(self) -> fx.Node:
        """The stream before the block."""
        return self.sublayers[0].entry

    @property
    def exit(self) -> fx.Node:
        """The stream after the block."""
        return self.sublayers[-1].exit

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the block."""
        return tuple(node for sublayer in self.sublayers for node in sublayer.nodes)


@dataclass(frozen=True)
class Unseen:
    """Something that looks like a part but could not be viewed, and why."""

    what: str
    node: str
    reason: str
