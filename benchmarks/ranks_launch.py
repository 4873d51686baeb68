"""Commands under torchrun with a time limit, after which all their processes are killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def torchrun(ranks: int, *module: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
    ]
    return [*launcher, "-m", "--", *module]


def train(ranks: int, run: Path, *options: str, sequences: int) -> list[str]:
    """Return the command of a training with `geodiag train`."""
    more = ("train", "--run", str(run), "--sequences", str(sequences), *options)
    return (
        torchrun(ranks, "geodiag.cli", *more)
        if ranks > 1
        else [sys.executable, "-m", "geodiag.cli", *more]
    )


class Started:
    """A running command; at the end of the `with` block all its processes are gone.

    Its output goes to a file: a pipe could stay open in an orphaned process and block the reader.
    """

    def __init__(self, command: list[str], log: Path, seconds: float) -> None:
        self.log = log
        self.began = time.monotonic()
        self.ends = self.began + seconds
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            _kill(self.process)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """Return the newest step in its output."""
        steps = re.findall(r"^step (\d+)/", self.output(), flags=re.MULTILINE)
        return int(steps[-1]) if steps else 0

    @property
    def running(self) -> bool:
        """Whether the command is running and within its time limit."""
        return self.process.poll() is None and time.monotonic() < self.ends

    def finish(self) -> dict[str, Any]:
        """Wait for the end, or kill it after its time limit; return how it ended."""
        try:
            self.process.wait(max(self.ends - time.monotonic(), 0.0))
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
            _kill(self.process)
        seconds = time.monotonic() - self.began
        return {
            "code": self.process.returncode,
            "hung": hung,
            "seconds": seconds,
            "tail": self.output()[-1500:],
        }


def call(command: list[str], log: Path, seconds: float) -> dict[str, Any]:
    with Started(command, log, seconds) as started:
        return started.finish()


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its descendants; workers of torchrun are in sessions of their own."""
    for pid in [process.pid, *_below(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _below(parent: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(
            int(stat.parent.name)
        )
    found = list(children.get(parent, ()))
    for pid in found:
        found += children.get(pid, ())
    return found
