"""Views: what the graph is made of, for passes and people."""

from graphopt.views.atoms import Atom, Axis, Keep, coordinates, find, flat, indices, leaves, size_of
from graphopt.views.cutting import cut, spell_sizes
from graphopt.views.kinds import Attention, Block, Experts, FeedForward, Mixer, SubLayer, Unseen
from graphopt.views.labels import Labels
from graphopt.views.model import Views
from graphopt.views.routing import Linear
from graphopt.views.units import Consumer, Occurrence, UnitGroup, unit_groups

__all__ = [
    "Atom",
    "Attention",
    "Axis",
    "Block",
    "Consumer",
    "Experts",
    "FeedForward",
    "Keep",
    "Labels",
    "Linear",
    "Mixer",
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
    "spell_sizes",
    "unit_groups",
]
