"""Observation: streaming statistics of a program on calibration text."""

from graphopt.observe.run import observe
from graphopt.observe.taps import Activity, Cosine, Gram, Grouped, Layout, Moments, Statistic, Statistics, Tap, Taylor
from graphopt.observe.text import next_token_loss, perplexity, token_batches

__all__ = [
    "Activity",
    "Cosine",
    "Gram",
    "Grouped",
    "Layout",
    "Moments",
    "Statistic",
    "Statistics",
    "Tap",
    "Taylor",
    "next_token_loss",
    "observe",
    "perplexity",
    "token_batches",
]
