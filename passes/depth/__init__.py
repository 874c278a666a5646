"""Passes that change how many layers run."""
