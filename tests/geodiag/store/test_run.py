"""The run directory: what is appended is read, once, by geodiag and by anybody's Parquet reader."""

import json
import math
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow.dataset as ds
import pytest

from geodiag.control import RequestWatch
from geodiag.errors import GeodiagError
from geodiag.events import Event
from geodiag.metrics.schema import SCHEMAS
from geodiag.run import Run, find_runs, open_run
from geodiag.store import writer as writing


def test_what_is_appended_is_read_with_nulls_and_nans_kept_apart(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append(
        "steps",
        {"step": [0, 1, 2], "loss": [1.5, math.nan, None], "grad_norm": 2, "routing_mode": "off"},
    )
    table = open_run(tmp_path / "a").read_arrow("steps")
    assert table.schema == SCHEMAS["steps"]
    assert table["loss"].null_count == 1
    assert math.isnan(table["loss"][1].as_py())
    assert table["grad_norm"].to_pylist() == [2.0, 2.0, 2.0]
    assert table["lr"].null_count == 3
    assert run.read("steps")["routing_mode"].tolist() == ["off"] * 3


def test_masked_arrays_and_numpy_scalars_become_nulls_and_numbers(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    load = np.ma.masked_array(np.array([0.25, 9.0, 1e300]), mask=[False, True, False])
    run.append(
        "experts", {"step": np.int64(3), "layer": np.int64(1), "expert": np.arange(3), "load": load}
    )
    rows = run.read("experts", ["step", "expert", "load"])
    assert rows["step"].tolist() == [3, 3, 3]
    assert rows["load"].tolist()[0] == 0.25
    assert math.isnan(rows["load"].tolist()[1])
    assert rows["load"].tolist()[2] == math.inf


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"step": [0], "loss_typo": [1.0]}, "no column loss_typo"),
        ({"loss": [1.0]}, "need a step"),
        ({"step": [0], "routing_mode": ["sideways"]}, "routing_mode is one of .* not sideways"),
        ({"step": [0, 1], "loss": [1.0, 2.0, 3.0]}, "length"),
    ],
)
def test_a_callers_mistake_is_a_value_error_and_spoils_nothing(
    tmp_path: Path, columns: dict, match: str
) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": [0]})
    with pytest.raises(ValueError, match=match):
        run.append("steps", columns)
    run.append("steps", {"step": [1]})
    assert run.read("steps")["step"].tolist() == [0, 1]


def test_steps_are_half_open_and_columns_come_in_the_order_asked(make_run) -> None:
    run = make_run(steps=20)
    rows = run.read("steps", ["loss", "step"], steps=(5, 8))
    assert list(rows) == ["loss", "step"]
    assert rows["step"].tolist() == [5, 6, 7]
    assert len(run.read("steps", steps=(18, None))) == 2
    assert len(run.read("steps", steps=(None, 2))) == 2
    assert len(run.read("steps", steps=(100, 200))) == 0


def test_parts_roll_and_merge_without_losing_or_doubling_a_row(
    make_run, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 3)
    run = make_run(steps=310)
    assert run.read("steps")["step"].tolist() == list(range(310))
    assert len(run.read("layers")) == 310 * 6
    parts = list((tmp_path / "run/steps/rank-0").glob("*.parquet"))
    assert len(parts) < 20, "310 steps in rolls of 3 are 104 parts if nothing merges them"
    sizes = sorted(len(pd.read_parquet(p)) for p in parts)
    assert sizes[-1] == 300, "ten parts of thirty rows become one in their turn"


def test_any_parquet_reader_opens_a_closed_table(make_run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(writing, "ROLL_BATCHES", 4)
    make_run(steps=50)
    table = tmp_path / "run" / "layers"
    assert len(pd.read_parquet(table)) == 300
    assert ds.dataset(table).count_rows(filter=ds.field("step") < 10) == 60


def test_a_run_is_read_through_any_fsspec_url(make_run, tmp_path: Path) -> None:
    local = make_run("remote", steps=7, close=False)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "remote"), "/bucket/remote", recursive=True)
    run = open_run("memory://bucket/remote")
    assert run.read("steps").equals(local.read("steps"))
    assert [r.name for r in find_runs("memory://bucket")] == ["remote"]
    with pytest.raises(GeodiagError, match="not on this machine"):
        run.request("on")


def test_ranks_are_read_together_and_told_apart(tmp_path: Path) -> None:
    first = Run.create(tmp_path / "a", world_size=2)
    second = Run.create(tmp_path / "a", rank=1, world_size=2, attempt=first.attempt)
    for run in (second, first):
        run.append("steps", {"step": [0, 1], "loss": [1.0, 1.0]})
    first.close()
    rows = open_run(tmp_path / "a").read("steps")
    assert rows[["rank", "step"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert json.loads((tmp_path / "a/run.json").read_text())["status"] == "finished"


# -- attempts ------------------------------------------------------------------------------


def losses(run: Run, **how) -> list[tuple[int, int, float]]:
    rows = run.read("steps", ["attempt", "step", "loss"], **how)
    return [(int(a), int(s), float(v)) for a, s, v in rows.to_numpy()]


def test_a_rollback_hides_the_steps_it_abandoned_and_keeps_them_on_record(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": range(6), "loss": [1.0] * 6})
    assert run.next_attempt() == 1
    run.append("steps", {"step": [4, 5], "loss": [2.0, 2.0]})
    assert losses(run) == [(0, s, 1.0) for s in range(4)] + [(1, 4, 2.0), (1, 5, 2.0)]
    assert losses(run, attempt=0) == [(0, s, 1.0) for s in range(6)]
    assert losses(run, attempt=np.int64(1)) == [(1, 4, 2.0), (1, 5, 2.0)]
    assert len(losses(run, attempt="all")) == 8
    assert losses(run, steps=(5, None)) == [(1, 5, 2.0)]
    assert losses(run, attempt="all", steps=(3, 5)) == [(0, 3, 1.0), (0, 4, 1.0), (1, 4, 2.0)]
    with pytest.raises(GeodiagError, match="no attempt 'latest'"):
        run.read("steps", attempt="latest")


def test_a_rollback_within_a_rollback_leaves_every_step_once(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    for first, last in [(0, 10), (6, 12), (3, 9), (8, 14)]:
        run.append(
            "steps", {"step": range(first, last), "loss": [float(run.attempt)] * (last - first)}
        )
        run.append("layers", {"step": range(first, last), "layer": 0, "site": "attn"})
        run.next_attempt()
    assert [a for a, _, _ in losses(run)] == [0] * 3 + [2] * 5 + [3] * 6
    assert run.read("layers")["step"].tolist() == list(range(14))


def test_events_keep_the_whole_trail(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": range(6)})
    run.event(
        Event(
            step=5, kind="spike", message="torn", data={"score": np.float32(7.5), "peak": math.nan}
        )
    )
    run.next_attempt()
    run.append("steps", {"step": [4]})
    rows = run.read("events")
    assert rows["kind"].tolist() == ["spike"]
    assert json.loads(rows["data"][0]) == {"score": 7.5, "peak": None}


def test_an_attempt_killed_before_its_first_step_gives_its_number_to_nobody(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": range(4)})
    del run
    killed = Run.create(tmp_path / "a")
    killed.append("layers", {"step": [4], "layer": [0], "site": ["attn"]})
    del killed
    run = Run.create(tmp_path / "a")
    assert run.attempt == 2
    run.append("layers", {"step": [4], "layer": [0], "site": ["attn"]})
    assert run.read("layers")["attempt"].tolist() == [2]
    run.append("steps", {"step": [4]})
    assert run.read("steps")["step"].tolist() == list(range(5))


def test_a_lost_manifest_is_told_from_the_rows(make_run, tmp_path: Path) -> None:
    run = make_run(steps=6, close=False)
    run.next_attempt()
    run.append("steps", {"step": [4, 5, 6]})
    del run
    (tmp_path / "run/run.json").write_text('{"schema_version": 1, "attem')
    run = open_run(tmp_path / "run")
    assert "run.json" in run.problems
    assert run.read("steps")["step"].tolist() == list(range(7))
    resumed = Run.create(tmp_path / "run")
    assert resumed.attempt == 2
    resumed.append("steps", {"step": [7]})
    assert resumed.read("steps")["attempt"].tolist() == [0] * 4 + [1] * 3 + [2]


# -- the way back --------------------------------------------------------------------------


def test_a_request_is_seen_once_and_stands_until_it_is_acknowledged(
    make_run, tmp_path: Path
) -> None:
    run = make_run(close=False)
    watch = RequestWatch(tmp_path / "run")
    assert watch.poll() is None
    asked = open_run(tmp_path / "run").request("on", delay_steps=4)
    assert open_run(tmp_path / "run").pending() == asked
    assert watch.poll() == asked
    assert watch.poll() is None
    run.event(Event(step=20, kind="acknowledge", message="on", data={"request": asked.id}))
    assert open_run(tmp_path / "run").pending() is None
    newer = open_run(tmp_path / "run").request("off")
    assert watch.poll() == newer


def test_a_request_to_a_training_that_is_no_more_is_not_obeyed_by_the_next(
    make_run, tmp_path: Path
) -> None:
    make_run()
    open_run(tmp_path / "run").request("on")
    resumed = Run.create(tmp_path / "run")
    assert RequestWatch(tmp_path / "run").poll() is None
    asked = resumed.request("auto")
    assert RequestWatch(tmp_path / "run").poll() == asked, (
        "asked after the start, before the first look"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"routing": "sideways"}', '{"routing": "on", "delay_steps": "x"}']
)
def test_a_control_file_that_makes_no_sense_is_no_request(
    make_run, tmp_path: Path, text: str
) -> None:
    make_run(close=False)
    (tmp_path / "run/control.json").write_text(text)
    assert RequestWatch(tmp_path / "run").poll() is None
    assert open_run(tmp_path / "run").pending() is None


def test_an_earlier_attempt_is_read_as_it_was_when_it_was_the_newest(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": [0, 1, 2, 3], "loss": [0.0, 0.25, 0.5, 0.75]})
    run.event(Event(step=3, kind="spike", message="first attempt"))
    for attempt, first in ((1, 2), (2, 1)):
        assert run.next_attempt() == attempt
        run.append("steps", {"step": [first, first + 1], "loss": [attempt, attempt + 0.5]})
    run.event(Event(step=2, kind="spike", message="last attempt"))
    run.close()

    opened = open_run(tmp_path / "a")
    views = {n: opened.as_of_attempt(n) for n in (0, 1, 2)}
    losses = {n: view.read("steps")["loss"].tolist() for n, view in views.items()}
    assert losses == {0: [0.0, 0.25, 0.5, 0.75], 1: [0.0, 0.25, 1.0, 1.5], 2: [0.0, 2.0, 2.5]}
    assert losses[2] == opened.read("steps")["loss"].tolist(), "the newest attempt"
    assert views[0].read("steps", attempt=1)["loss"].tolist() == [1.0, 1.5], "as asked explicitly"
    assert len(views[0].read("events")) == 2, "events are complete"
    assert (
        views[1].refresh().read("steps")["loss"].tolist() == views[1].read("steps")["loss"].tolist()
    )
    with pytest.raises(ValueError, match="open for reading only"):
        views[0].append("steps", {"step": [4]})


def test_an_earlier_attempt_is_read_without_a_manifest(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("steps", {"step": [0, 1, 2]})
    run.next_attempt()
    run.append("steps", {"step": [1]})
    run.close()
    (tmp_path / "a" / "run.json").unlink()
    opened = open_run(tmp_path / "a")
    assert opened.as_of_attempt(0).read("steps")["step"].tolist() == [0, 1, 2]
    assert opened.read("steps")["step"].tolist() == [0, 1]
