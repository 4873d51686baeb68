"""A real training in its own process, controlled from the page and from the command line."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from geodiag.run import Run, open_run

TRAIN = ["train", "--size", "tiny", "--sequences", "2", "--steps", "100000", "--delay", "2"]
PATIENCE = 120.0


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """A training that is under way, in its own process; stopped at the end as a person would, with
    Ctrl-C.
    """
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "geodiag.cli", *TRAIN, "--run", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait(
            lambda: (folder / "run.json").exists() and (open_run(folder).last_step() or 0) > 1,
            process,
        )
        yield folder
    finally:
        process.send_signal(2)
        try:
            _, output = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # does nothing to one that has ended
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert open_run(folder).status() == "interrupted"


def wait(fact: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < end, "it never happened"
        assert process is None or process.poll() is None, "the training ended by itself"
        time.sleep(0.1)


def modes(run: Run) -> list[str]:
    return run.read("steps")["routing_mode"].astype(str).tolist()


def messages(folder: Path, kind: str) -> list[str]:
    events = open_run(folder).read("events")
    return events[events["kind"] == kind]["message"].tolist()


@pytest.mark.browser
def test_the_page_switches_routing_of_a_live_training(training: Path, chromium) -> None:
    from geodiag.dashboard.serve import DashboardServer

    page = DashboardServer(training, "127.0.0.1", 0, None)
    thread = threading.Thread(target=page.run, daemon=True)
    thread.start()
    try:
        tab = chromium.new_page()
        tab.goto(page.url)
        tab.locator("#ask-on").click()
        wait(lambda: messages(training, "acknowledge") != [])
        wait(lambda: "on" in modes(open_run(training)))
        tab.locator("#control-state", has_text="on").wait_for()
        tab.locator("#ask-off").click()
        wait(lambda: modes(open_run(training))[-1] == "off")
        tab.close()
    finally:
        page.stop()
        thread.join(10)
    assert messages(training, "acknowledge") == [
        "obeyed: routing on (by dashboard)",
        "obeyed: routing off (by dashboard)",
    ]
    trail = messages(training, "routing")
    assert [m.removeprefix("routing went from ") for m in trail] == [
        "off to warmup",
        "warmup to on",
        "on to drain",
        "drain to off",
    ]
    steps = open_run(training).read("steps")
    on = steps[steps["routing_mode"] == "on"]
    assert (on["routing_lag"] == 2).all()
    layers = open_run(training).read("layers", ["step", "flip_rate_anticipatory"])
    assert set(layers.dropna()["step"]) == set(steps[steps["routing_lag"] == 2]["step"])


def test_the_command_line_switches_routing_of_a_live_training_that_stays_readable(
    training: Path,
) -> None:
    command = [
        sys.executable,
        "-m",
        "geodiag.cli",
        "routing",
        str(training),
        "on",
        "--wait",
        str(PATIENCE),
    ]
    output = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert output.returncode == 0, output.stderr
    assert "obeyed" in output.stdout
    wait(lambda: "on" in modes(open_run(training)))
    run = open_run(training)
    steps, layers = run.read("steps"), run.read("layers")
    assert steps["step"].tolist() == list(range(len(steps)))
    assert set(steps["step"]) <= set(layers["step"])
    assert run.problems == {}
