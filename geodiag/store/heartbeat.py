"""Signs of life: what a training leaves about itself, and whether it still lives."""

import os
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

SILENT_SECONDS = 60.0
"""A training on another machine that said nothing for so long is taken for dead."""


def sign(step: int | None) -> dict[str, Any]:
    """What this process says of itself in heartbeat.json."""
    me = os.getpid()
    return {"pid": me, "started": _started(me), "host": _place(), "time": time.time(), "step": step}


def age(beat: Any) -> float | None:
    """Seconds since the sign, or None where there is none."""
    said = beat.get("time") if isinstance(beat, dict) else None
    return time.time() - said if isinstance(said, int | float) else None


def lives(beat: Any) -> bool:
    """Whether the process that left this sign still runs: looked up on its own machine, judged by
    silence elsewhere.
    """
    silence = age(beat)
    if silence is None:
        return False
    if beat.get("host") == _place() and isinstance(beat.get("pid"), int):
        started = _started(beat["pid"])
        known = (
            _started(os.getpid()) is not None
        )  # a system without /proc says only whether there is such a process
        return (
            (started is not None and started == beat.get("started"))
            if known
            else _exists(beat["pid"])
        )
    return silence < SILENT_SECONDS


@cache
def _place() -> str:
    """This machine and process-id namespace: containers may share a host's name, not its process
    ids.
    """
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When process `pid` began, in ticks since the machine did; None where it is dead or the system
    does not say.
    """
    try:
        # After the name, which is in brackets and may hold anything: state, parent, …, 20th the
        # start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
