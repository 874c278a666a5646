"""Passes, one file each: the axis along which graphopt grows. Import them as `graphopt.passes`."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes; a bare `import passes` would load a second copy of every class")
