"""How answers travel: text leaves compressed, and a page of charts says at once which large files
it will need.
"""

import gzip
from collections.abc import Container

from flask import Flask, Response, request

_LEVEL = 1
"""Half a second more for the best level would be worse than the bytes it saves, here and over a
tunnel.
"""
_MIN_BYTES = 1400
"""Bytes that fit into one packet anyway."""
_TEXT = ("application/json", "application/javascript", "text/", "image/svg")
_LIBRARIES = "/_dash-component-suites/"
"""Dash's own files: their addresses change with their version, so that one address is always the
same file.
"""


_CHARTS = (f"{_LIBRARIES}plotly/package_data/plotly.min.js", f"{_LIBRARIES}dash/dcc/async-graph.js")


def compress(server: Flask) -> None:
    """Answers with gzip wherever the browser takes it. Figures shrink to about half."""
    files: dict[str, bytes] = {}

    @server.after_request
    def compress_response(response: Response) -> Response:
        takes = "gzip" in request.headers.get("Accept-Encoding", "")
        if not takes or response.status_code != 200 or response.headers.get("Content-Encoding"):
            return response
        if not (response.mimetype or "").startswith(_TEXT):
            return response
        key = request.path if request.path.startswith(_LIBRARIES) else None
        if key in files:
            small = files[key]
        else:
            response.direct_passthrough = False  # a file that was to be streamed: read it
            body = response.get_data()
            if len(body) < _MIN_BYTES:
                return response
            small = gzip.compress(body, _LEVEL, mtime=0)
            if key:
                files[key] = small
        response.set_data(small)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        return response


def preload(server: Flask, pages: Container[str]) -> None:
    """The charting library is asked for with the page itself, not only once the first chart is on
    it.
    """
    link = ", ".join(f"<{file}>; rel=preload; as=script" for file in _CHARTS)

    @server.after_request
    def hint(response: Response) -> Response:
        parts = request.path.strip("/").split("/")
        if len(parts) == 3 and parts[0] == "run" and parts[2] in pages:
            response.headers["Link"] = link
        return response
