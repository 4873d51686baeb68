"""`geodiag dashboard DIR`: serves one run or a folder of runs, and prints the address with its
token.
"""

from pathlib import Path
from typing import Annotated

import typer

_HOST = "Address to listen on. Beyond loopback, whoever has the token may look and steer."
_TOKEN = "The token that the page asks for; a random one if not given."


def dashboard(
    path: Annotated[Path, typer.Argument(help="A run directory, or a folder of them.", show_default=False)],
    host: Annotated[str, typer.Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8050,
    token: Annotated[str | None, typer.Option(envvar="GEODIAG_TOKEN", help=_TOKEN, show_default=False)] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser.")] = False,
) -> None:  # fmt: skip
    """Serve the page over one run or a folder of runs."""
    from geodiag.dashboard.serve import serve

    serve(path, host, port, token, open_browser, say=_say)


def _say(url: str) -> None:
    typer.echo(f"geodiag dashboard: {url}")
    typer.echo("The token in this address is its key. Ctrl-C ends.")
