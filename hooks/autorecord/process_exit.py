"""ProcessExit: how a process ended (by itself, by an error, by Ctrl-C), known at its very end."""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import util
from types import TracebackType

from geodiag.run import Status


class ProcessExit:
    """Calls `end(status)` once, before the functions registered earlier with `atexit`.

    In a forked process, which does not end what its parent began, `in_fork` is called instead.
    """

    def __init__(self, end: Callable[[Status], None], in_fork: Callable[[], None]) -> None:
        self._end = end
        self._in_fork = in_fork
        self._pid = os.getpid()
        self._uncaught: type[BaseException] | None = None
        self._excepthook = sys.excepthook
        sys.excepthook = self._note_uncaught
        atexit.register(self._exit)
        if multiprocessing.parent_process() is not None:
            # Such a process ends without the functions of `atexit`.
            util.Finalize(None, self._exit, exitpriority=0)

    def _note_uncaught(
        self, kind: type[BaseException], value: BaseException, trace: TracebackType | None
    ) -> None:
        self._uncaught = kind
        self._excepthook(kind, value, trace)

    def _exit(self) -> None:
        atexit.unregister(self._exit)
        if os.getpid() == self._pid:
            self._end(self._status())
        else:
            self._in_fork()

    def _status(self) -> Status:
        _, error, _ = sys.exc_info()  # an error in flight, if multiprocessing ends the process
        kind = self._uncaught or (type(error) if error is not None else None)
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            return "finished"
        return "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
