"""graphopt.report."""
