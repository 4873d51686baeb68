"""The script `geodiag` and `python -m geodiag.cli`: run the command line."""

import sys

from geodiag.extras import MissingPackageError, requires_extra


def main() -> None:
    """Run the command line; exit with 1 and one line on stderr where typer or rich is missing."""
    try:
        with requires_extra("the command line"):
            from geodiag.cli.main import main as run
    except MissingPackageError as error:
        print(f"geodiag: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    run()


if __name__ == "__main__":
    main()
