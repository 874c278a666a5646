"""graphopt.observe."""
