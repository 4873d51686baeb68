"""A training that starts with SIGINT ignored, like a background job of a script, ignores it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geodiag.run import open_run
from tests.geodiag.store import kills
from tests.hooks.autorecord import unedited, watching

pytestmark = pytest.mark.slow

SLEEPS = (
    unedited.PLAIN
    + """
import signal, time
print("ignored", signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)
time.sleep(1)
"""
)


def ignore() -> None:
    """Ignore SIGINT in a child that is about to start its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_geodiag_train_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = kills.start(run, kills.text(tmp_path), "--steps", "6", preexec_fn=ignore)
    printed = kills.wait_for(process, 2)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, printed + rest
    assert open_run(run).status() == "finished"
    assert open_run(run).read("steps")["step"].tolist() == list(range(6))


def test_geodiag_run_and_its_command_go_on(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(unedited.FEW)
    (tmp_path / "train.py").write_text(SLEEPS)
    process = watching.start(tmp_path, [sys.executable, "train.py"], preexec_fn=ignore)
    assert process.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("ignored"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()
    assert lines[-1] == "ignored True\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert open_run(tmp_path / "run").status() == "finished"


def test_a_child_of_the_tests_does_not_ignore_it() -> None:
    command = [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
