"""Names that the graphopt format is made of; imported without torch."""

from __future__ import annotations

GRAPH_FILE = "graph.txt"
CONSTANTS_FILE = "constants.safetensors"
TRAIL_FILE = "trail.json"
MODEL_TYPE = "graphopt"
