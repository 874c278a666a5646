"""graphopt.cost."""
