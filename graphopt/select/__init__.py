"""graphopt.select."""
