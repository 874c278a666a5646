"""Passes on the key-value cache."""
