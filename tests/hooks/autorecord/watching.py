"""A script under `geodiag run` in its own process, and without it, for the tests."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from geodiag.run import Run, open_run
from tests.paths import ROOT


def start(folder: Path, command: Sequence[str], *options: str, **how: Any) -> subprocess.Popen[str]:
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | how.pop("env", {})
    )
    main = [sys.executable, "-m", "geodiag.cli", "run", "--run", "run", *options, "--", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        main, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, **how
    )


def watched(
    folder: Path,
    script: str,
    *options: str,
    command: Sequence[str] = (sys.executable,),
    arguments: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """`geodiag run` of a script, in a process of its own."""
    (folder / "train.py").write_text(script)
    process = start(folder, [*command, "train.py", *arguments], *options)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def unwatched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the script prints without geodiag."""
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("few", None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
    return printed.getvalue()


def recorded(folder: Path, done: subprocess.CompletedProcess, status: str = "finished") -> Run:
    """The run, whose losses are those that the script printed."""
    assert (folder / "run/run.json").exists(), done.stderr
    run = open_run(folder / "run")
    assert run.read("steps")["loss"].tolist() == [float(line) for line in done.stdout.split()], (
        done.stderr
    )
    assert run.status() == status
    assert run.read("events")["kind"].tolist() == ["attempt"], done.stderr
    assert "geodiag show run" in done.stderr.splitlines()[-1]
    return run
