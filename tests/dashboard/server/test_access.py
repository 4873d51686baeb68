"""Access: refused without the token, under another host name, and with a wrong token."""

import pytest
from typer import Typer
from typer.testing import CliRunner

from geodiag.dashboard.app import create_app
from geodiag.dashboard.serve import DashboardServer, serve
from geodiag.dashboard.server.access import new_token
from geodiag.errors import GeodiagError

HOST = {"base_url": "http://127.0.0.1:8050"}


@pytest.fixture(scope="module")
def app(runs):
    return create_app(str(runs), "secret")


def test_nothing_is_served_without_the_token(app):
    client = app.server.test_client()
    for path in (
        "/",
        "/_dash-layout",
        "/_dash-dependencies",
        "/assets/style.css",
        "/run/mhc-tear/gain",
        "/nothing",
    ):
        answer = client.get(path, **HOST)
        assert answer.status_code == 403, path
        assert "token" in answer.text
    assert client.post("/_dash-update-component", json={}, **HOST).status_code == 403
    assert client.get("/?token=wrong", **HOST).status_code == 403
    assert client.get("/?token=", **HOST).status_code == 403
    assert client.get("/?token=é", **HOST).status_code == 403
    assert client.open("/", method="OPTIONS", **HOST).status_code == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(app):
    client = app.server.test_client()
    answer = client.get("/run/mhc-tear/gain?steps=1-9&token=secret", **HOST)
    assert answer.status_code == 302
    assert answer.headers["Location"] == "/run/mhc-tear/gain?steps=1-9"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "geodiag-8050" in cookie
    assert client.get("/", **HOST).status_code == 200


def test_another_host_name_is_refused_even_with_the_token(app):
    client = app.server.test_client()
    client.get("/?token=secret", **HOST)
    for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "[::2]", ""):
        assert client.get("/?token=secret", headers={"Host": host}).status_code == 403, host
    assert client.get("/?token=secret", headers={"Host": "localhost:9999"}).status_code == 302


def test_a_post_from_another_origin_is_refused(app):
    client = app.server.test_client()
    client.get("/?token=secret", **HOST)
    call = {"json": {}, **HOST}
    assert (
        client.post(
            "/_dash-update-component", headers={"Origin": "http://localhost:3000"}, **call
        ).status_code
        == 403
    )
    assert (
        client.post("/_dash-update-component", headers={"Origin": "null"}, **call).status_code
        == 403
    )
    same = client.post(
        "/_dash-update-component", headers={"Origin": "http://127.0.0.1:8050"}, **call
    )
    assert same.status_code != 403


def test_without_a_given_token_there_is_a_random_one(runs):
    one, two = create_app(str(runs)), create_app(str(runs))
    tokens = {a.server.config["GEODIAG_TOKEN"] for a in (one, two)}
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 32
    assert new_token() != new_token()


def test_the_content_policy_forbids_other_hosts(app):
    client = app.server.test_client()
    client.get("/?token=secret", **HOST)
    page = client.get("/", **HOST)
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert "https://" not in page.text


def test_a_port_in_use_names_one_that_is_free(runs):
    first = DashboardServer(runs, "127.0.0.1", 0, None)
    try:
        with pytest.raises(
            GeodiagError, match=rf"port {first.port} is in use; pass --port \d+, which is free"
        ):
            serve(runs, port=first.port)
    finally:
        first._server.server_close()


def test_an_unknown_host_is_one_error_line(runs):
    with pytest.raises(GeodiagError, match=r"--host 127\.0\.0\.1"):
        serve(runs, host="203.0.113.7", port=0)


def test_an_empty_folder_is_refused_before_anything_is_served(tmp_path):
    with pytest.raises(GeodiagError, match="pass a run directory"):
        serve(tmp_path, port=0)


def test_the_command_prints_the_address_with_its_token(runs, monkeypatch):
    from geodiag.cli.dashboard import dashboard

    monkeypatch.setattr(DashboardServer, "run", lambda self: self._server.server_close())
    cli = Typer()
    cli.command()(dashboard)
    out = CliRunner().invoke(cli, [str(runs), "--port", "0", "--token", "abc"])
    assert out.exit_code == 0
    assert "http://127.0.0.1:" in out.output
    assert "/?token=abc" in out.output
