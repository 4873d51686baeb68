"""The published measurements; each module is a `geodiag bench NAME`."""

if __name__ == "benchmarks":
    # A second import name would load a second copy of every class.
    raise ImportError("import geodiag.benchmarks, not benchmarks")
