"""graphopt.compiler."""
