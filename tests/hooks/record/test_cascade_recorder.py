"""CascadeRecorder: one event for each spike, written in the background; failures are reported."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import geodiag
from geodiag.cascade.explain import AFTER
from geodiag.events import details
from geodiag.hooks.faults import plant
from geodiag.hooks.record import cascade_recorder
from tests.hooks import small
from tests.paths import ROOT

RISEN = range(94, 104)


def train(folder: Path, steps: int, **watched: Any) -> list[float]:
    """An expert breaks at step 90, and the loss as it is reported rises for a while; the training's
    own losses.
    """
    t, losses = small.trainer(), []
    with small.watch(t, folder, **watched) as monitor:
        faults = plant(t.model, "expert-scale@90:1=30")
        for step in range(steps):
            faults.before_step(step)
            losses.append(small.one_step(t, small.tokens(step)))
            monitor.step(losses[-1] + (3.0 if step in RISEN else 0.0))
    return losses


def cascade_events(folder: Path) -> list[dict[str, Any]]:
    rows = geodiag.open_run(folder).read_arrow("events").to_pylist()
    return [r | {"data": details(r["data"])} for r in rows if r["kind"] == "cascade"]


def spikes(folder: Path) -> list[dict[str, Any]]:
    rows = geodiag.open_run(folder).read_arrow("events").to_pylist()
    return [r for r in rows if r["kind"] == "spike"]


@pytest.mark.slow
def test_each_spike_leaves_the_cascade_that_the_record_gives(tmp_path: Path) -> None:
    train(tmp_path / "run", 125)
    (spike,), (event,) = spikes(tmp_path / "run"), cascade_events(tmp_path / "run")
    assert event["step"] == spike["step"] + AFTER
    found = geodiag.explain(tmp_path / "run", 0)
    assert (found.stage, found.layer) == (1, 1)
    assert (event["layer"], event["site"], event["expert"]) == (
        found.layer,
        found.site,
        found.expert,
    )
    assert event["message"] == found.words
    data = event["data"]
    assert data["attempt"] == 0
    for name in ("stage", "onset", "spike_onset", "lead", "cause", "defence", "evidence"):
        assert data[name] == found.as_json()[name], name
    assert data["path"][:-1] == found.as_json()["path"][:-1]
    assert data["spike"]["end"] is None  # it was not over when it was explained


@pytest.mark.slow
def test_a_calm_training_leaves_none(tmp_path: Path) -> None:
    with small.watch(small.trainer(), tmp_path / "run") as monitor:
        for step in range(120):
            monitor.step(
                3.0 + 0.01 * (step % 2) + (2.0 if step == 90 else 0.0)
            )  # an outlier is no spike
    kinds = [r["kind"] for r in geodiag.open_run(tmp_path / "run").read_arrow("events").to_pylist()]
    assert "outlier" in kinds
    assert cascade_events(tmp_path / "run") == []


@pytest.mark.slow
def test_a_spike_shortly_before_the_end_is_explained_at_the_end(tmp_path: Path) -> None:
    train(tmp_path / "run", RISEN[0] + 5)
    (spike,), (event,) = spikes(tmp_path / "run"), cascade_events(tmp_path / "run")
    assert spike["step"] <= event["step"] < spike["step"] + AFTER
    assert event["data"]["spike_onset"] == RISEN[0]


@pytest.mark.slow
def test_a_spike_that_was_rolled_back_is_explained_from_its_own_attempt(tmp_path: Path) -> None:
    t = small.trainer()
    snapshots = geodiag.Snapshots(t.model, t.optimizers, every=10, where="memory")
    policy = geodiag.Policy.parse("rollback", mode="auto")
    with small.watch(t, tmp_path / "run", snapshots=snapshots, policy=policy) as monitor:
        for taken, _ in enumerate(monitor.batches(iter(lambda: 0, 1))):
            step = monitor.next_step
            small.one_step(t, small.tokens(step))
            monitor.step(3.0 + 0.01 * (step % 3) + (3.0 if step >= 90 and taken < 100 else 0.0))
            if step == 110:
                break
    rows = geodiag.open_run(tmp_path / "run").read_arrow("events").to_pylist()
    assert [r["kind"] for r in rows].count("rollback") == 1
    (event,) = cascade_events(tmp_path / "run")
    assert event["data"]["attempt"] == 0
    assert event["data"]["spike_onset"] == 90
    assert event["step"] == spikes(tmp_path / "run")[0]["step"]


def test_the_training_does_not_wait_for_it_until_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, explained, steps = threading.Event(), cascade_recorder.cascade_event, []

    def slow(*a: Any) -> Any:
        assert go.wait(60)
        return explained(*a)

    monkeypatch.setattr(cascade_recorder, "cascade_event", slow)
    monitor = small.watch(small.trainer(), tmp_path / "run")
    for step in range(130):
        monitor.step(3.0 + 0.01 * (step % 2) + (3.0 if step in RISEN else 0.0))
        steps.append(step)
    assert len(steps) == 130
    assert cascade_events(tmp_path / "run") == []
    go.set()
    monitor.close()
    assert len(cascade_events(tmp_path / "run")) == 1


def test_a_failure_is_reported_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(tmp_path / "plain", 125)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("no such window")

    monkeypatch.setattr(cascade_recorder, "cascade_event", broken)
    assert train(tmp_path / "run", 125) == plain
    run = geodiag.open_run(tmp_path / "run")
    assert run.status() == "finished"
    problems = [
        r["message"] for r in run.read_arrow("events").to_pylist() if r["kind"] == "problem"
    ]
    assert problems == [
        "could not record the cascade behind a spike: ZeroDivisionError: no such window"
    ]
    assert capsys.readouterr().err.count("no such window") == 1


def test_an_interpreter_that_ends_without_close_explains_the_last_spike_and_closes_the_run(
    tmp_path: Path,
) -> None:
    script = f"""
import atexit, threading
from pathlib import Path
from tests.hooks import small

ending, begin = threading.Event(), threading.Thread.start

def start(thread):  # as of Python 3.12
    if ending.is_set():
        raise RuntimeError("can't create new thread at interpreter shutdown")
    begin(thread)

threading.Thread.start = start
monitor = small.watch(small.trainer(), Path({str(tmp_path / "run")!r}))
atexit.register(ending.set)
for step in range(100):
    monitor.step(3.0 + 0.01 * (step % 2) + (3.0 if step >= 94 else 0.0))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)
    assert geodiag.open_run(tmp_path / "run").manifest["status"] == "interrupted"
    assert len(cascade_events(tmp_path / "run")) == 1
