"""How answers travel: compressed where the browser takes it, the same once unpacked, and charts
asked for ahead.
"""

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


def test_a_large_answer_is_small_on_the_way_and_the_same_at_the_end(client):
    small = client.get(PLOTLY, headers={"Accept-Encoding": "gzip, br"}, **HERE)
    whole = client.get(PLOTLY, **HERE)
    assert small.headers["Content-Encoding"] == "gzip"
    assert int(small.headers["Content-Length"]) == len(small.data) < 0.5 * len(whole.data)
    assert gzip.decompress(small.data) == whole.data
    assert "Content-Encoding" not in whole.headers
    assert (
        client.get(PLOTLY, headers={"Accept-Encoding": "gzip"}, **HERE).data == small.data
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
    said = {"json": body, **HERE}
    small = client.post("/_dash-update-component", headers={"Accept-Encoding": "gzip"}, **said)
    whole = client.post("/_dash-update-component", **said)
    assert small.headers["Content-Encoding"] == "gzip"
    assert len(small.data) < 0.7 * len(whole.data)
    assert json.loads(gzip.decompress(small.data)) == whole.json
    assert whole.json["response"]["gain-heat"]["figure"]["data"]


def test_what_fits_into_one_packet_or_is_no_text_is_left_alone(client):
    plain = {"Accept-Encoding": "gzip"}
    assert "Content-Encoding" not in client.get("/assets/mark.svg", headers=plain, **HERE).headers
    assert (
        "Content-Encoding"
        not in client.get("/run/plain/gain?token=secret", headers=plain, **HERE).headers
    )


def test_a_refusal_is_a_refusal_however_it_is_asked_for(runs):
    stranger = create_app(str(runs), "secret").server.test_client()
    answer = stranger.get(PLOTLY, headers={"Accept-Encoding": "gzip"}, **HERE)
    assert answer.status_code == 403
    assert b"plotly" not in answer.data[:50]


@pytest.mark.parametrize(
    ("path", "hinted"), [("gain", True), ("cascade", True), ("events", False), ("nothing", False)]
)
def test_a_page_of_charts_asks_for_the_charting_library_at_once(client, path, hinted):
    link = client.get(f"/run/mhc-tear/{path}", **HERE).headers.get("Link", "")
    assert (PLOTLY in link) == hinted
    assert "Link" not in client.get("/", **HERE).headers
