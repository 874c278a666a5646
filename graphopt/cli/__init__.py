"""The command line. Nothing here loads torch before a command needs it."""

from graphopt.cli.entry import app, main

__all__ = ["app", "main"]
