"""Compression: gzip if the browser accepts it, equal content when unpacked, preload headers."""

import gzip
import json

import pytest

from geodiag.dashboard.app import create_app

HERE = {"base_url": "http://127.0.0.1:8050"}
PLOTLY = "/_dash-component-suites/plotly/package_data/plotly.min.js"


@pytest.fixture(scope="module")
def client(runs):
    client = create_app(str(runs), "secret").server.test_client()
    client.get("/?token=secret", **HERE)
    return client


def test_a_large_response_is_compressed_and_decompresses_to_the_same_bytes(client):
    compressed = client.get(PLOTLY, headers={"Accept-Encoding": "gzip, br"}, **HERE)
    plain = client.get(PLOTLY, **HERE)
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert int(compressed.headers["Content-Length"]) == len(compressed.data) < 0.5 * len(plain.data)
    assert gzip.decompress(compressed.data) == plain.data
    assert "Content-Encoding" not in plain.headers
    assert (
        client.get(PLOTLY, headers={"Accept-Encoding": "gzip"}, **HERE).data == compressed.data
    )  # as kept


def test_a_figure_is_compressed_too(client):
    dependencies = client.get("/_dash-dependencies", **HERE).json
    draw = next(d for d in dependencies if d["output"] == "gain-heat.figure")
    values = {"url.search": "", "pulse.data": {"run": "mhc-tear"}, "theme.data": "light"}
    body = {
        "output": draw["output"], "outputs": {"id": "gain-heat", "property": "figure"},
        "changedPropIds": ["pulse.data"],
        "inputs": [i | {"value": values[f"{i['id']}.{i['property']}"]} for i in draw["inputs"]],
        "state": [{"id": "url", "property": "pathname", "value": "/run/mhc-tear/gain"}],
    }  # fmt: skip
    request = {"json": body, **HERE}
    compressed = client.post(
        "/_dash-update-component", headers={"Accept-Encoding": "gzip"}, **request
    )
    plain = client.post("/_dash-update-component", **request)
    assert compressed.headers["Content-Encoding"] == "gzip"
    assert len(compressed.data) < 0.7 * len(plain.data)
    assert json.loads(gzip.decompress(compressed.data)) == plain.json
    assert plain.json["response"]["gain-heat"]["figure"]["data"]


def test_small_responses_and_binary_files_are_not_compressed(client):
    plain = {"Accept-Encoding": "gzip"}
    assert "Content-Encoding" not in client.get("/assets/mark.svg", headers=plain, **HERE).headers
    assert (
        "Content-Encoding"
        not in client.get("/run/plain/gain?token=secret", headers=plain, **HERE).headers
    )


def test_a_refused_request_is_refused_with_and_without_compression(runs):
    stranger = create_app(str(runs), "secret").server.test_client()
    answer = stranger.get(PLOTLY, headers={"Accept-Encoding": "gzip"}, **HERE)
    assert answer.status_code == 403
    assert b"plotly" not in answer.data[:50]


@pytest.mark.parametrize(
    ("path", "hinted"), [("gain", True), ("cascade", True), ("events", False), ("nothing", False)]
)
def test_a_page_of_charts_preloads_the_charting_library(client, path, hinted):
    link = client.get(f"/run/mhc-tear/{path}", **HERE).headers.get("Link", "")
    assert (PLOTLY in link) == hinted
    assert "Link" not in client.get("/", **HERE).headers
