"""Access control: a token for every request, known host names, a strict content policy."""

import hmac
import secrets
from urllib.parse import urlencode, urlsplit

from flask import Flask, Response, redirect, request

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>geodiag</title>
<body style="{style}">{text}</body></html>
"""
_STYLE = "font:16px/1.6 system-ui,sans-serif;max-width:36em;margin:18vh auto;padding:0 1.5em"
_NO_TOKEN = (
    "This page needs its token: open the address that <code>geodiag dashboard</code> printed, "
    "the one with ?token=…"
)
_WRONG_HOST = (
    "This page is served only under its own address: open the one that "
    "<code>geodiag dashboard</code> printed."
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Dash starts with an inline script; all other scripts are files of this server.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


def new_token() -> str:
    """Return a random token of 24 bytes."""
    return secrets.token_urlsafe(24)


def require_token(server: Flask, token: str, only_loopback: bool = True) -> None:
    """Refuse every request, callbacks included, whose cookie does not hold `token`.

    `?token=…` in an address sets the cookie; the redirect removes it from the address. With
    `only_loopback`, requests under any other host name are refused as well, which stops a web page
    that rebinds its own name to 127.0.0.1 (DNS rebinding).
    """

    @server.before_request
    def check():
        if only_loopback and urlsplit(f"//{request.host}").hostname not in LOOPBACK:
            return _refuse(_WRONG_HOST)
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            return _refuse(_WRONG_HOST)
        given = request.args.get("token")
        if given is not None and request.method == "GET" and _same(given, token):
            return _set_cookie(token)
        if not _same(request.cookies.get(_cookie(), ""), token):
            return _refuse(_NO_TOKEN)
        return None

    @server.after_request
    def set_security_headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


def _cookie() -> str:
    # Browsers share cookies between the ports of a host: a name per port separates two dashboards.
    return f"geodiag-{urlsplit(f'//{request.host}').port or 80}"


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _refuse(text: str) -> Response:
    return Response(_PAGE.format(style=_STYLE, text=text), status=403, mimetype="text/html")


def _set_cookie(token: str) -> Response:
    kept = urlencode([(k, v) for k, v in request.args.items() if k != "token"])
    response = redirect(request.path + (f"?{kept}" if kept else ""))
    response.set_cookie(_cookie(), token, httponly=True, samesite="Strict")
    return response  # type: ignore[return-value]
