"""Passes that add what drafts tokens, and train it."""
