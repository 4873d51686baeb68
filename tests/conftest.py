"""Shared by all tests: markers, signals, runs in temporary folders, the CLI in-process."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from geodiag.run import Run
from tests.paths import ROOT

KERNELS = ROOT / "tests/reference_models/kernels"
SLOW = [
    ROOT / "tests" / place
    for place in (
        "benchmarks",  # small runs of the measurements
        "cli/test_train.py",  # trainings
        "geodiag/store/test_crash.py",  # processes that are killed
        "hooks/adapters/test_deepseek_v4.py",  # trainings of transformers' model
        "hooks/autorecord",  # `geodiag run` in processes of its own
        "hooks/control/test_steering.py",  # trainings
        "hooks/distributed",  # several ranks
        "hooks/record/test_cascade_recorder.py",  # trainings that end in many ways
        "hooks/routing",  # trainings, each of them several times
        "hooks/snapshots/test_rollback.py",  # the same
        "reference_models/test_deepseek_v4_oracle.py",  # transformers' model
        "reference_models/test_training.py",  # trainings
    )
]
"""Folders and files whose tests all have the marker slow; single tests carry it themselves."""

if not torch.cuda.is_available():
    # Triton reads it once, when it is first imported, which any test's imports may bring about.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Let child processes begin with the default action of SIGINT.

    A background job of a shell script ignores SIGINT, and what is ignored stays ignored in its
    children, whereas a handler does not. With a handler that does nothing, this process still
    ignores SIGINT and the trainings that tests interrupt do not.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda _number, _frame: None)


LONGEST = (
    "hooks/distributed/test_ranks.py",
    "cli/test_demo.py",
    "hooks/autorecord/test_run_scripts.py",
    "hooks/autorecord/test_run_command.py",
    "reference_models/kernels/test_watched.py",
    "hooks/routing/test_anticipatory.py",
    "geodiag/store/test_crash.py",
    "cli/test_train.py",
    "dashboard/pages/test_browser.py",
)
"""Files that take minutes. They start first, so that workers end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow folders, and those of the kernels; put the longest files first.

    Kernels run in Triton's interpreter where there is no GPU.
    """
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))
    for item in items:
        if any(item.path.is_relative_to(place) for place in SLOW):
            item.add_marker(pytest.mark.slow)
        if item.path.is_relative_to(KERNELS):
            item.add_marker(pytest.mark.triton)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip browser tests where there is no Chromium; in CI, fail them."""
    if item.get_closest_marker("browser"):
        from geodiag.cli.doctor import find_chromium

        if find_chromium() is None:
            why = "no Chromium on this machine; install it: apt-get install chromium"
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """Write a small run, `make_run("a", steps=20, layers=3)`, in a temporary folder.

    The run is closed unless `close=False`.
    """

    def make(
        name: str = "run", *, steps: int = 20, layers: int = 3, close: bool = True, **changes: Any
    ) -> Run:
        run = Run.create(
            tmp_path / name, found={"sites": 2 * layers, "routers": layers, "experts": 4 * layers}
        )
        for step in range(steps):
            write_step(run, step, layers, **changes)
        if close:
            run.close()
        return run

    return make


def write_step(
    run: Run, step: int, layers: int = 3, loss: float | None = None, **changes: Any
) -> None:
    """One healthy step of a small run; `changes` are columns of `layers` that differ."""
    run.append(
        "steps",
        {
            "step": [step],
            "loss": [3.0 - 0.01 * step if loss is None else loss],
            "routing_mode": ["off"],
        },
    )
    rows = 2 * layers
    columns = {
        "composite_gain_fwd": [1.0 + 0.001 * i for i in range(rows)],
        "flip_rate": [0.01] * rows,
    }
    where = {"layer": [i // 2 for i in range(rows)], "site": ["attn", "ffn"] * layers}
    run.append("layers", {"step": [step] * rows, **where, **columns, **changes})
    run.heartbeat(step)


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run a command line in this process, `cli("show", path)`; return its output and exit code."""
    from geodiag.cli.main import app

    def call(*args: Any) -> Any:
        return CliRunner().invoke(app, [str(a) for a in args])

    return call
