"""graphopt.views."""
