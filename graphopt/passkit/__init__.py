"""graphopt.passkit."""
