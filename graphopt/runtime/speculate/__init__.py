"""Speculative decoding: a drafter proposes a token tree, one run of the program verifies it, acceptance keeps a path.

Read `decode.py` first. A method adds a drafter; trees, verification, acceptance, commit and the log are shared.
"""

from graphopt.runtime.speculate.accept import Acceptance, Exact, Greedy, Typical
from graphopt.runtime.speculate.build import Template, best_first, from_template, widths
from graphopt.runtime.speculate.control import Controller, Fixed, Goodput
from graphopt.runtime.speculate.decode import Speculator
from graphopt.runtime.speculate.drafter import Drafter, Rows
from graphopt.runtime.speculate.log import Event, Log
from graphopt.runtime.speculate.tree import ONE_HOT, Tree

__all__ = [
    "ONE_HOT",
    "Acceptance",
    "Controller",
    "Drafter",
    "Event",
    "Exact",
    "Fixed",
    "Goodput",
    "Greedy",
    "Log",
    "Rows",
    "Speculator",
    "Template",
    "Tree",
    "Typical",
    "best_first",
    "from_template",
    "widths",
]
