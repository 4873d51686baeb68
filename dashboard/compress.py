"""Smaller answers: everything that is text leaves compressed, and a library's files are compressed once."""

import gzip

from flask import Flask, Response, request

_LEVEL = 1
"""Half a second more for the best level would be worse than the bytes it saves, here and over a tunnel."""
_LEAST = 1400
"""Bytes that fit into one packet anyway."""
_TEXT = ("application/json", "application/javascript", "text/", "image/svg")
_LIBRARIES = "/_dash-component-suites/"
"""Dash's own files: their addresses change with their version, so that one address is always the same file."""


def compress(server: Flask) -> None:
    """Answers with gzip wherever the browser takes it. Figures are mostly numbers in base64 and shrink to about half."""
    files: dict[str, bytes] = {}

    @server.after_request
    def shrink(response: Response) -> Response:
        takes = "gzip" in request.headers.get("Accept-Encoding", "")
        if not takes or response.status_code != 200 or response.headers.get("Content-Encoding"):
            return response
        if not (response.mimetype or "").startswith(_TEXT):
            return response
        key = request.full_path if request.path.startswith(_LIBRARIES) else None
        if key in files:
            small = files[key]
        else:
            response.direct_passthrough = False  # a file that was to be streamed: read it
            whole = response.get_data()
            if len(whole) < _LEAST:
                return response
            small = gzip.compress(whole, _LEVEL, mtime=0)
            if key:
                files[key] = small
        response.set_data(small)
        response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        return response
