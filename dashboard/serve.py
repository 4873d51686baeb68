"""The web server: it binds the socket first, so that a port in use gives one clear error line."""

import errno
import logging
import os
import socket
import threading
import webbrowser
from collections.abc import Callable

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from geodiag.dashboard.app import create_app
from geodiag.dashboard.figures.style import LIGHT, empty
from geodiag.dashboard.server.access import LOOPBACK, new_token
from geodiag.errors import GeodiagError


class DashboardServer:
    """The dashboard with a bound port: its address and the loop that serves requests."""

    def __init__(self, path: str | os.PathLike, host: str, port: int, token: str | None) -> None:
        token = token or new_token()
        app = create_app(os.fspath(path), token, only_loopback=host in LOOPBACK)
        listening = _bind(host, port)
        self.port: int = listening.getsockname()[1]
        self._server: BaseWSGIServer = make_server(
            host,
            self.port,
            app.server,
            threaded=True,
            request_handler=_QuietHandler,
            fd=listening.fileno(),
        )
        listening.close()  # the server has its own copy of the socket
        own_name = socket.gethostname()
        name = {"0.0.0.0": own_name, "::": own_name, "::1": "[::1]"}.get(host, host)
        self.url = f"http://{name}:{self.port}/?token={token}"

    def run(self) -> None:
        """Serve requests until `stop` or Ctrl-C."""
        threading.Thread(target=warm_up, daemon=True).start()
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def stop(self) -> None:
        """End `run`, called from another thread."""
        self._server.shutdown()


def warm_up() -> None:
    """Create Plotly's validators, which takes 0.3 s once, before the first request."""
    fig = empty("", LIGHT)
    fig.add_heatmap(z=[[0]], coloraxis="coloraxis")
    fig.add_scatter(x=[0], y=[0], marker={"color": "#000000"}, line={"width": 1})
    fig.add_shape(type="line", x0=0, x1=1, y0=0, y1=1, line={"width": 1})
    fig.to_json()


def serve(
    path: str | os.PathLike,
    host: str = "127.0.0.1",
    port: int = 8050,
    token: str | None = None,
    open_browser: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """Serve the run or folder of runs at `path` until Ctrl-C.

    `port=0` takes a free port; `say` is called with the address. GeodiagError if there is no run or
    if the port is in use.
    """
    page = DashboardServer(path, host, port, token)
    say(page.url)
    if open_browser:
        webbrowser.open(page.url)
    page.run()


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise GeodiagError(f"there is no host {host!r}; pass --host 127.0.0.1") from None
    listening = socket.socket(family, kind)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as e:
        listening.close()
        if e.errno == errno.EADDRINUSE:
            raise GeodiagError(
                f"port {port} is in use; pass --port {_free_port(host)}, which is free"
            ) from None
        if e.errno == errno.EACCES:
            raise GeodiagError(
                f"port {port} needs more rights; pass --port {_free_port(host)}"
            ) from None
        raise GeodiagError(
            f"cannot listen on {host}: {e.strerror}; pass --host 127.0.0.1"
        ) from None
    return listening


def _free_port(host: str) -> int:
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.bind(address)
        return probe.getsockname()[1]


class _QuietHandler(WSGIRequestHandler):
    """A request handler without a log line per request, with persistent connections."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


logging.getLogger("werkzeug").setLevel(logging.ERROR)
