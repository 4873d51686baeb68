"""Recording and steering inside a training: `geodiag.attach` and what it is made of."""

if __name__ == "hooks":
    # A second import name would load a second copy of every class.
    raise ImportError("import geodiag.hooks, not hooks")
