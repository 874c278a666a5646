"""Costs counted from the graph: parameters, bytes, FLOPs and KV bytes as formulae in the program's dimensions."""

from graphopt.cost.count import Breakdown, Cost, Part, cost
from graphopt.cost.flops import node_flops
from graphopt.cost.formula import formula

__all__ = ["Breakdown", "Cost", "Part", "cost", "formula", "node_flops"]
