"""Run a command as a child process that keeps its input, output, signals and exit code."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from geodiag.errors import GeodiagError

_FORWARDED = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_AWAITED = {*_FORWARDED, signal.SIGCHLD}
_POLL_SECONDS = 1.0
"""Longest wait before the child is polled again, in case its SIGCHLD is lost."""


@contextmanager
def signals_blocked() -> Iterator[set]:
    """Block the forwarded signals for `run_command`; yield the signals that were blocked before.

    Enter it before heavy imports: a thread that was started earlier could receive the signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_command(command: Sequence[str], environment: Mapping[str, str], mask: set) -> int:
    """Run the command to its end and return its exit code; 128 + N if signal N ended it.

    Signals from other processes are forwarded to the command. Signals from the terminal (Ctrl-C)
    are not, because the terminal sends them to the command as well. mask: signals that are blocked
    when the command starts. GeodiagError if it cannot be started.
    """
    child = _start(command, environment, mask)
    while child.poll() is None:
        info = signal.sigtimedwait(_AWAITED, _POLL_SECONDS)
        sent_by_a_process = info is not None and info.si_code <= 0
        if info is not None and sent_by_a_process and info.si_signo in _FORWARDED:
            child.send_signal(info.si_signo)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def check(program: str) -> None:
    """GeodiagError if there is no such program, or the file is not executable."""
    if shutil.which(program) is not None:
        return
    if os.path.isfile(program):
        raise GeodiagError(
            f"cannot run {program}: the file is not executable; write python {program}"
        )
    fix = "check its spelling, or install it"
    if program.endswith(".py"):
        fix = f"write python {program}"
    raise GeodiagError(f"no command {program!r}; {fix}")


def _start(
    command: Sequence[str], environment: Mapping[str, str], mask: set
) -> subprocess.Popen[bytes]:
    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(command, env=environment, preexec_fn=unblock)
    except OSError as e:
        raise GeodiagError(
            f"cannot run {command[0]}: {e.strerror}; write its interpreter in front, e.g. bash"
        ) from None
