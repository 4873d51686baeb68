"""heartbeat.json: which process writes a run, and whether that process is still running."""

import os
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

SILENT_SECONDS = 60.0
"""A run on another machine counts as dead when its heartbeat is older than this."""


def heartbeat(step: int | None) -> dict[str, Any]:
    """Return the content of heartbeat.json for this process at `step`."""
    pid = os.getpid()
    return {
        "pid": pid,
        "started": _start_time(pid),
        "host": _host(),
        "time": time.time(),
        "step": step,
    }


def age(beat: Any) -> float | None:
    """Return the seconds since a heartbeat, or None where there is none."""
    written = beat.get("time") if isinstance(beat, dict) else None
    return time.time() - written if isinstance(written, int | float) else None


def is_alive(beat: Any) -> bool:
    """Return whether the process that wrote a heartbeat is still running.

    On the process's own machine the process table decides, elsewhere the age of the heartbeat.
    """
    silence = age(beat)
    if silence is None:
        return False
    pid = beat.get("pid")
    if beat.get("host") != _host() or not isinstance(pid, int):
        return silence < SILENT_SECONDS

    has_start_times = _start_time(os.getpid()) is not None
    if not has_start_times:  # a system without /proc
        return _exists(pid)
    # A process id is used again after a while; together with the start time it is unique.
    started = _start_time(pid)
    return started is not None and started == beat.get("started")


@cache
def _host() -> str:
    """Return this machine and process-id namespace.

    Containers may share a host name, but process ids are distinct in a namespace only.
    """
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_time(pid: int) -> str | None:
    """Return the start of process `pid` in clock ticks since boot.

    None where the process has ended, or the system has no /proc.
    """
    try:
        # The name is in brackets and may contain anything. After it come the state, the parent, …;
        # the 20th field is the start time.
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
