"""One writer per rank of a run: two trainings in one folder would replace each other's rows."""

import contextlib
import errno
import os
from pathlib import Path

from geodiag.errors import GeodiagError

try:
    import fcntl
except ImportError:  # Windows has no such locks; runs are written there without one
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock of this process until it is released or the process ends, also by kill -9.

    Forked worker processes do not hold it. GeodiagError where another process holds it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a+")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks: write without one
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            raise GeodiagError(
                f"{path.parent.parent} is being written by process {holder}; "
                "stop that training, or name another folder"
            ) from None
        with contextlib.suppress(OSError):  # the process id is needed for the message only
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def release(self) -> None:
        """Release the lock. Releasing twice does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()
