"""Passes that change how many tokens run."""
