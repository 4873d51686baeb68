"""`python -m geodiag.hooks.faults` prints docs/faults.md."""

from geodiag.hooks.faults.catalogue import page

if __name__ == "__main__":
    print(page(), end="")
