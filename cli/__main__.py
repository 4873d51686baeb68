"""`python -m geodiag.cli` is `geodiag`."""

from geodiag.cli.main import main

if __name__ == "__main__":
    main()
