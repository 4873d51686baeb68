"""`geodiag dashboard DIR`: serve one run or a folder of runs as a web page."""

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    path: Annotated[
        Path, typer.Argument(help="A run directory, or a folder of runs.", show_default=False)
    ],
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. On other addresses than loopback, everyone with the token "
            "can read the runs and steer the training."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8050,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="GEODIAG_TOKEN", help="Token for access to the page.", show_default="random"
        ),
    ] = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the address in a browser.")
    ] = False,
) -> None:
    """Serve the dashboard for one run or a folder of runs and print its address."""
    from geodiag.dashboard.serve import serve

    serve(path, host, port, token, open_browser, say=_print_address)


def _print_address(url: str) -> None:
    typer.echo(f"geodiag dashboard: {url}")
    typer.echo("Access needs the token in this address. Ctrl-C stops the server.")
