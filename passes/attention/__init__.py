"""Passes that change attention: heads and keys."""
