"""graphopt.testing."""
