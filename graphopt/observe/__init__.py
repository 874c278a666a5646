"""Observation: streaming statistics of a program on calibration text."""

from graphopt.observe.taps import Cosine, Gram, Moments, Statistic, Statistics, Tap, Taylor

__all__ = ["Cosine", "Gram", "Moments", "Statistic", "Statistics", "Tap", "Taylor"]
