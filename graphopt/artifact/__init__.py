"""graphopt.artifact."""
