"""Backends: where a program runs or is lowered. Import them as `graphopt.backends`."""

if __name__ != "graphopt.backends":
    raise ImportError("import graphopt.backends; a bare `import backends` would load a second copy of every class")
