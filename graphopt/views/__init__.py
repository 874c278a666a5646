"""Views: what the graph is made of, for passes and people."""

from graphopt.views.atoms import Atom, Axis, Keep, find, flat, indices, leaves, size_of
from graphopt.views.cut import cut
from graphopt.views.labels import Labels, Linear
from graphopt.views.model import Attention, Block, FeedForward, SubLayer, Unseen, Views

__all__ = [
    "Atom",
    "Attention",
    "Axis",
    "Block",
    "FeedForward",
    "Keep",
    "Labels",
    "Linear",
    "SubLayer",
    "Unseen",
    "Views",
    "cut",
    "find",
    "flat",
    "indices",
    "leaves",
    "size_of",
]
