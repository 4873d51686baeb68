"""A command as a child process, as if it were started by hand: its input, output, signals and exit
code.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from geodiag.errors import GeodiagError

_PASSED_ON = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_HEARD = {*_PASSED_ON, signal.SIGCHLD}
_SECONDS = 1.0
"""Between looks at the command, should the news of its end be lost."""


@contextmanager
def signals_kept() -> Iterator[set]:
    """Inside, signals wait for `carry_out`; yields which were blocked before.

    To be entered before anything heavy is imported: a thread that was started earlier may take them
    for itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def carry_out(command: Sequence[str], environment: Mapping[str, str], mask: set) -> int:
    """Runs the command to its end; its exit code, 128 + N where signal N ended it, as shells say
    it.

    Signals are passed on, but not those that the terminal sends: Ctrl-C reaches the command by
    itself, and once is enough. `mask`: the signals that the command begins with blocked.
    GeodiagError where it cannot be started.
    """
    child = _started(command, environment, mask)
    while child.poll() is None:
        info = signal.sigtimedwait(_HEARD, _SECONDS)
        if (
            info is not None and info.si_signo in _PASSED_ON and info.si_code <= 0
        ):  # a process sent it, no terminal
            child.send_signal(info.si_signo)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def check(program: str) -> None:
    """GeodiagError where there is no such program, or it is no program."""
    if shutil.which(program) is not None:
        return
    if os.path.isfile(program):
        raise GeodiagError(
            f"cannot run {program}: it is no program of its own; write python {program}"
        )
    fix = (
        f"write python {program}"
        if program.endswith(".py")
        else "is it spelt right, and installed here?"
    )
    raise GeodiagError(f"no command {program!r}; {fix}")


def _started(
    command: Sequence[str], environment: Mapping[str, str], mask: set
) -> subprocess.Popen[bytes]:
    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(command, env=environment, preexec_fn=unblock)
    except OSError as e:
        raise GeodiagError(
            f"cannot run {command[0]}: {e.strerror}; write what runs it in front, e.g. bash"
        ) from None
