"""The run cache: ranks are merged, null differs from NaN, a refresh reads only new steps."""

import json
import time

import numpy as np
import pytest

from geodiag.dashboard.data.grid import Grid
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.dashboard.data.timeline_marks import routing_spans, spikes_from_events
from geodiag.dashboard.server.run_library import RunLibrary
from geodiag.dashboard.url.url_state import View, apply_zoom
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.run import Run, open_run
from tests.dashboard import synthetic

SHORT = synthetic.RunScript(steps=30, layers=2)


def rows(step, **columns):
    return {"step": [step, step], "layer": [0, 0], "site": ["attn", "ffn"], **columns}


def test_ranks_are_reduced_by_the_rule_of_the_registry(tmp_path):
    both = [Run.create(tmp_path / "r", rank=rank, world_size=2) for rank in (0, 1)]
    for run, gain, worst in zip(both, (1.0, 3.0), (5.0, 2.0), strict=True):
        run.append(
            "layers",
            rows(0, composite_gain_fwd=[gain, gain], composite_gain_fwd_max=[worst, worst]),
        )
        run.append("steps", {"step": [0], "loss": [gain], "tokens": [100.0], "grad_norm": [worst]})
    for run in both:
        run.close()
    cache = RunCache(open_run(tmp_path / "r"))
    mean, most = cache.grids("layers", "composite_gain_fwd", "composite_gain_fwd_max")
    assert mean.values_RS.ravel().tolist() == [2, 2]
    assert most.values_RS.ravel().tolist() == [5, 5]
    assert [float(cache.steps()[k][0]) for k in ("loss", "tokens", "grad_norm")] == [2, 200, 5]


def test_null_stays_a_gap_and_nan_does_not(tmp_path):
    run = Run.create(tmp_path / "r")
    run.append("layers", rows(0, composite_gain_fwd=np.ma.MaskedArray([np.nan, 1], [False, True])))
    run.close()
    value = (
        RunCache(open_run(tmp_path / "r")).grids("layers", "composite_gain_fwd")[0].values_RS[:, 0]
    )
    assert value[0] == np.inf
    assert np.isnan(value[1])


def test_a_live_run_is_followed_and_equals_a_fresh_reading(tmp_path):
    run = synthetic.create(tmp_path / "r", SHORT)
    cache = RunCache(open_run(tmp_path / "r"))
    before = cache.refresh()
    for first in range(0, 30, 7):
        synthetic.write_rows(run, SHORT, first, min(first + 7, 30))
        after = cache.refresh()
        assert after != before
        before = after
        grid = cache.grids("layers", "composite_gain_bwd")[0]
        assert grid.steps_S[-1] == cache.steps()["step"][-1] == min(first + 7, 30) - 1
    assert cache.refresh() == before
    run.close()
    fresh = RunCache(open_run(tmp_path / "r")).grids("layers", "composite_gain_bwd")[0]
    assert np.array_equal(grid.values_RS, fresh.values_RS, equal_nan=True)


def test_rarely_sampled_metrics_are_refreshed_without_reading_all_steps(tmp_path):
    run = Run.create(tmp_path / "r")
    cache = RunCache(open_run(tmp_path / "r"))
    for step in (0, 200, 400):
        run.append("layers", rows(step, stream_rms=[step, step]))
        cache.refresh()
        cache.grids("layers", "stream_rms")
    run.append("layers", {"step": [401], "layer": [0], "site": ["ffn"], "stream_rms": [7.0]})
    cache.refresh()
    assert ("layers", "stream_rms") in cache._grids  # continued, not thrown away
    grid = cache.grids("layers", "stream_rms")[0]
    assert grid.steps_S.tolist() == [0, 200, 400, 401]
    assert grid.values_RS[1].tolist() == [0, 200, 400, 7]
    assert np.isnan(grid.values_RS[0, 3])
    run.append("layers", {"step": [402], "layer": [9], "site": ["ffn"], "stream_rms": [1.0]})
    cache.refresh()
    assert cache.grids("layers", "stream_rms")[0].rows == ((0, 0), (0, 1), (9, 1))
    run.close()


def test_a_new_attempt_replaces_old_rows(tmp_path):
    run = synthetic.create(tmp_path / "r", SHORT)
    synthetic.write_rows(run, SHORT, 0, 30)
    cache = RunCache(open_run(tmp_path / "r"))
    cache.refresh()
    assert cache.grids("layers", "stream_rms")[0].steps_S[-1] == 29
    run.next_attempt()
    run.append("steps", {"step": [10], "loss": [7.0]})
    run.append(
        "layers",
        {"step": [10] * 4, "layer": [0, 0, 1, 1], "site": ["attn", "ffn"] * 2, "stream_rms": 9.0},
    )
    cache.refresh()
    assert cache.steps()["step"][-1] == 10
    grid = cache.grids("layers", "stream_rms")[0]
    assert (grid.steps_S[-1], grid.values_RS[0, -1]) == (10, 9)
    run.close()


def test_rows_in_another_order_are_put_in_static_order(tmp_path):
    run = Run.create(tmp_path / "r")
    run.append(
        "layers",
        {
            "step": [0] * 3,
            "layer": [1, 0, 0],
            "site": ["attn", "ffn", "attn"],
            "stream_rms": [3, 2, 1],
        },
    )
    run.close()
    grid = RunCache(open_run(tmp_path / "r")).grids("layers", "stream_rms")[0]
    assert grid.rows == ((0, 0), (0, 1), (1, 0))
    assert grid.values_RS.ravel().tolist() == [1, 2, 3]


def test_recent_equals_the_end_of_the_complete_grid(runs):
    cache = RunCache(open_run(runs / "mhc-tear"))
    few = cache.recent("layers", "stream_rms", back=5)[0]
    complete = cache.grids("layers", "stream_rms")[0]
    assert few.steps_S.tolist() == complete.steps_S[-5:].tolist()
    assert np.array_equal(few.values_RS, complete.values_RS[:, -5:])


def test_a_long_run_read_in_chunks_gives_the_same_grid(runs, monkeypatch):
    (at_once,) = RunCache(open_run(runs / "mhc-tear")).grids("layers", "transport_gain_fwd")
    monkeypatch.setattr(
        "geodiag.store.step_chunks.CELLS", 6000
    )  # 5 columns, 12 rows a step: 100 steps
    cache, read = RunCache(open_run(runs / "mhc-tear")), []
    make = cache._read_grids
    monkeypatch.setattr(cache, "_read_grids", lambda *a: read.append(a[-1]) or make(*a))
    (grid,) = cache.grids("layers", "transport_gain_fwd")
    assert read[:2] == [(None, 100), (100, 200)]
    assert len(read) == 6
    assert grid.rows == at_once.rows
    assert np.array_equal(grid.steps_S, at_once.steps_S)
    assert np.array_equal(grid.values_RS, at_once.values_RS, equal_nan=True)


def test_chunks_with_different_rows_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("geodiag.store.step_chunks.CELLS", 1)
    monkeypatch.setattr("geodiag.store.step_chunks.NEWEST_STEPS", 1)
    run = Run.create(tmp_path / "r")
    for step in (0, 1):
        run.append("steps", {"step": [step], "loss": [1.0]})
    run.append("layers", rows(0, stream_rms=[1.0, 2.0]))
    run.append("layers", {"step": [1], "layer": [0], "site": ["ffn"], "stream_rms": [3.0]})
    run.close()
    (grid,) = RunCache(open_run(tmp_path / "r")).grids("layers", "stream_rms")
    assert grid.rows == ((0, 0), (0, 1))
    assert np.array_equal(grid.values_RS, [[1, np.nan], [2, 3]], equal_nan=True)


def test_a_run_without_routing_modes_is_off(tmp_path):
    run = Run.create(tmp_path / "r")
    run.append("steps", {"step": [0, 1], "loss": [2.0, 2.0]})
    assert RunCache(open_run(tmp_path / "r")).routing_mode() == "off"
    run.append("steps", {"step": [2], "loss": [2.0], "routing_mode": ["drain"]})
    run.close()
    assert RunCache(open_run(tmp_path / "r")).routing_mode() == "drain"


def test_a_model_of_one_stream_has_no_maps(tmp_path):
    for name, found, has in (
        ("a", {"sites": 12, "streams": 1}, False),
        ("b", {"sites": []}, False),
        ("c", {"sites": 12, "streams": 4}, True),
        ("d", {}, True),
    ):
        Run.create(tmp_path / name, found=found).close()
        assert RunCache(open_run(tmp_path / name)).has_maps() is has


def test_worst_names_value_step_and_row():
    from geodiag.metrics.schema import METRICS

    grid = Grid(
        METRICS["layers", "stream_amax"],
        ((0, 0), (0, 1)),
        np.array([5, 9]),
        np.array([[1, 2], [8, np.nan]]),
    )
    assert grid.worst() == (8, 5, (0, 1))
    assert Grid(grid.metric, (), np.array([]), np.empty((0, 0))).worst() is None


def test_spikes_get_peak_and_end_from_later_events(tmp_path):
    events = [e.columns() for e in synthetic.MHC.events()]
    rows_of_events = [{k: v[0] for k, v in e.items()} for e in events]
    (spike,) = spikes_from_events(rows_of_events)
    assert (spike.onset, spike.peak, spike.end, spike.score) == (360, 366, 405, 14.1)
    (early,) = spikes_from_events([e for e in rows_of_events if e["kind"] != "recovered"])
    assert (early.peak, early.end) == (None, None)


def test_an_event_with_strange_data_is_still_an_event():
    event = {"kind": "spike", "step": 5, "message": None, "data": "not json"}
    assert spikes_from_events([event])[0].onset == 5
    assert spikes_from_events([event | {"data": "[1]"}])[0].onset == 5
    assert spikes_from_events([event | {"data": '{"onset": null}'}])[0].onset == 5


def test_spans_are_runs_of_one_mode():
    found = routing_spans(np.arange(10), np.array([0, 1, 1, 2, 2, 2, 3, 0, -1, 2]))
    assert [(s.mode, s.start, s.end) for s in found] == [
        ("warmup", 1, 2), ("on", 3, 5), ("drain", 6, 6), ("on", 9, 9),
    ]  # fmt: skip


def test_a_corrupt_file_is_named_and_the_rest_is_shown(tmp_path):
    synthetic.write(tmp_path / "r", SHORT)
    part = next((tmp_path / "r" / "layers").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:200])
    cache = RunCache(open_run(tmp_path / "r"))
    assert cache.grids("layers", "stream_rms")[0].rows == ()
    assert len(cache.steps()["step"]) == 30
    assert any(part.name in name for name in cache.problems())


def test_every_view_survives_its_address():
    view = View(
        steps=(3, 90), step=7, site=(3, 1), layer=2, metric="flip_any", over="max", scale="log"
    )
    assert View.parse(view.query_string()) == view
    assert View().query_string() == ""


@pytest.mark.parametrize(
    "search",
    [
        "?steps=9-3",
        "?steps=a-b",
        "?step=-1",
        "?site=3.nowhere",
        "?metric=<script>",
        "?layer=1e9",
        "?x=1",
        "?=&&",
    ],
)
def test_nonsense_in_an_address_is_ignored(search):
    assert View.parse(search) == View()


def test_a_drag_and_a_double_click():
    view = View(layer=2)
    assert apply_zoom(view, {"xaxis.range[0]": 9.6, "xaxis.range[1]": 20.2}).steps == (10, 20)
    assert apply_zoom(view, {"xaxis2.range": [5, 3]}).steps == (3, 5)
    assert apply_zoom(view.replaced(steps=(1, 2)), {"xaxis.autorange": True}).steps is None
    assert apply_zoom(view, {"autosize": True}) == view
    assert apply_zoom(view, None) == view


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(GeodiagError, match="holds no runs"):
        RunLibrary(tmp_path)
    with pytest.raises(GeodiagError, match="does not exist"):
        RunLibrary(tmp_path / "nowhere")


def test_the_list_follows_the_folder(tmp_path):
    synthetic.write(tmp_path / "a", SHORT)
    library = RunLibrary(tmp_path)
    assert library.names() == ["a"]
    synthetic.write(tmp_path / "b", SHORT)
    assert library.names() == ["a", "b"]
    assert library.at_address("/run/b/gain").run.name == "b"
    assert library.at_address("/run/../gain") is None
    assert library.at_address("/nothing") is None


def test_a_request_is_shown_until_the_training_answers_it(tmp_path):
    from geodiag.dashboard.components.control_panel import _send_request, policy, state

    run = synthetic.create(tmp_path / "r", SHORT)
    synthetic.write_rows(run, SHORT, 0, 10)
    library = RunLibrary(tmp_path)
    answer = _send_request(library, "/run/r/overview", "on", 4)
    request = json.loads((tmp_path / "r" / "control.json").read_text())
    assert (request["routing"], request["delay_steps"], request["id"]) == ("on", 4, answer["id"])
    assert "requested: on" in str(state(library.get("r")))
    data = {"request": request["id"], "routing": "on"}
    run.event(Event(step=10, kind="acknowledge", message="routing on", data=data, time=time.time()))
    cache = library.get("r")
    assert "requested" not in str(state(cache))
    assert policy(cache) == "on"
    run.close()
    assert "not running" in _send_request(library, "/run/r/overview", "off", 4)["error"]
