"""Training: one loop over loss terms, trainable weights and a schedule, for every method that needs one."""

from graphopt.train.data import Windows
from graphopt.train.loop import Record, Trainer, train

__all__ = ["Record", "Trainer", "Windows", "train"]
