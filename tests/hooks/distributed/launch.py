"""Starts scenarios of scenarios.py on several ranks over gloo, each a process of its own, and hands
back what they say.

No rank outlives its test: whoever has not ended in time is killed, and that is a failure.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.paths import ROOT

SECONDS = 120
"""A scenario takes a few; starting torch on a busy machine takes the rest."""


@dataclass(frozen=True)
class Rank:
    """How one rank ended."""

    code: int
    said: dict[str, Any]
    heard: str
    """What it printed on stderr."""


def ranks(folder: Path, *scenarios: str, world: int = 2, seconds: float = SECONDS) -> list[Rank]:
    """Runs `NAME` or `NAME:OPTION`, one after the other, on `world` ranks; AssertionError where one
    of them hangs.

    Each has `folder/NAME:OPTION` to itself; `said` has its name as key.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
    }
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.hooks.distributed.scenarios", str(folder), *scenarios]
    errors = [(folder / f"stderr-{r}").open("w+") for r in range(world)]
    started = [
        subprocess.Popen(
            command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stderr=errors[r]
        )
        for r in range(world)
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{scenarios} hang:\n" + "\n".join(_text(e) for e in errors)) from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [Rank(p.returncode, _said(folder, r), _text(errors[r])) for r, p in enumerate(started)]


def _said(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"said-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _text(file: Any) -> str:
    file.seek(0)
    return file.read()
