"""graphopt.ir."""
