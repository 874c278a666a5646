"""Passes that change weights by training and leave the graph alone."""
