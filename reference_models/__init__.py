"""The reference mixture-of-experts transformer, its kernels, data and training loop."""

if __name__ == "reference_models":
    # A second import name would load a second copy of every class.
    raise ImportError("import geodiag.reference_models, not reference_models")
