"""`python -m geodiag.cli` is `geodiag`."""

from geodiag.cli.main import main

main()
