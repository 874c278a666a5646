"""Views: what the graph is made of, for passes and people."""

from graphopt.views.atoms import Atom, Axis, Keep, coordinates, find, flat, indices, leaves, size_of
from graphopt.views.cutting import cut
from graphopt.views.labels import Labels, Linear
from graphopt.views.model import Attention, Block, FeedForward, SubLayer, Unseen, Views
from graphopt.views.units import Consumer, Occurrence, UnitGroup, unit_groups

__all__ = [
    "Atom",
    "Attention",
    "Axis",
    "Block",
    "Consumer",
    "FeedForward",
    "Keep",
    "Labels",
    "Linear",
    "Occurrence",
    "SubLayer",
    "UnitGroup",
    "Unseen",
    "Views",
    "coordinates",
    "cut",
    "find",
    "flat",
    "indices",
    "leaves",
    "size_of",
    "unit_groups",
]
