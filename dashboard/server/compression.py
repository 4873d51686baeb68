"""Faster responses: gzip for text, and preload headers for the charting library."""

import gzip
from collections.abc import Container

from flask import Flask, Response, request

_LEVEL = 1
"""Fast gzip: the best level takes half a second longer, more than the saved bytes are worth."""
_MIN_BYTES = 1400
"""Smaller responses fit into one packet and are not compressed."""
_TEXT = ("application/json", "application/javascript", "text/", "image/svg")
_LIBRARIES = "/_dash-component-suites/"
"""Files of Dash. Their addresses contain the version, so the content never changes."""


_CHARTS = (f"{_LIBRARIES}plotly/package_data/plotly.min.js", f"{_LIBRARIES}dash/dcc/async-graph.js")


def compress(server: Flask) -> None:
    """Compress text responses with gzip if the browser accepts it. Figures shrink to half."""
    files: dict[str, bytes] = {}

    @server.after_request
    def compress_response(response: Response) -> Response:
        accepts = "gzip" in request.headers.get("Accept-Encoding", "")
        if not accepts or response.status_code != 200 or response.headers.get("Content-Encoding"):
            return response
        if not (response.mimetype or "").startswith(_TEXT):
            return response
        key = request.path if request.path.startswith(_LIBRARIES) else None
        if key in files:
            compressed = files[key]
        else:
            response.direct_passthrough = False  # read a file that would be streamed
            body = response.get_data()
            if len(body) < _MIN_BYTES:
                return response
            compressed = gzip.compress(body, _LEVEL, mtime=0)
            if key:
                files[key] = compressed
        response.set_data(compressed)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        return response


def preload(server: Flask, pages: Container[str]) -> None:
    """Add a header to `pages` that makes the browser load the charting library at once."""
    link = ", ".join(f"<{file}>; rel=preload; as=script" for file in _CHARTS)

    @server.after_request
    def hint(response: Response) -> Response:
        parts = request.path.strip("/").split("/")
        if len(parts) == 3 and parts[0] == "run" and parts[2] in pages:
            response.headers["Link"] = link
        return response
