"""How a process ends: by itself, by an exception, or by Ctrl-C; told at its very end."""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import util
from types import TracebackType

from geodiag.run import Status


class Ending:
    """Calls `end` once, before whatever was registered earlier to be called at the exit.

    A process forked off does not end what its parent began: there `elsewhere` is called.
    """

    def __init__(self, end: Callable[[Status], None], elsewhere: Callable[[], None]) -> None:
        self._end, self._elsewhere, self._pid = end, elsewhere, os.getpid()
        self._uncaught: type[BaseException] | None = None
        self._before, sys.excepthook = sys.excepthook, self._note
        atexit.register(self._over)
        if (
            multiprocessing.parent_process() is not None
        ):  # such a process ends without calling atexit
            util.Finalize(None, self._over, exitpriority=0)

    def _note(
        self, kind: type[BaseException], value: BaseException, trace: TracebackType | None
    ) -> None:
        self._uncaught = kind
        self._before(kind, value, trace)

    def _over(self) -> None:
        atexit.unregister(self._over)
        if os.getpid() == self._pid:
            self._end(self._status())
        else:
            self._elsewhere()

    def _status(self) -> Status:
        _, error, _ = sys.exc_info()  # on its way, where multiprocessing ends a process
        kind = self._uncaught or (type(error) if error is not None else None)
        if kind is None or (isinstance(error, SystemExit) and not error.code):
            return "finished"
        return "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
