"""The command line `geodiag`."""

if __name__ == "cli":
    # A second import name would load a second copy of every class.
    raise ImportError("import geodiag.cli, not cli")
