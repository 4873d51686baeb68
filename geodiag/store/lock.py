"""One writer a rank: two trainings in one folder would swallow each other's rows."""

import contextlib
import errno
import os
from pathlib import Path

from geodiag.errors import GeodiagError

try:
    import fcntl
except ImportError:  # Windows: no such locks, and no training on it that we know of
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Held by this process until released or dead, kill -9 included; worker processes forked off do
    not hold it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, path.open("a+")
        if fcntl is None:
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return  # this file system has no locks: go on without
            self._file.seek(0)
            holder = self._file.read().strip() or "?"
            self._file.close()
            folder = path.parent.parent
            raise GeodiagError(
                f"{folder} is being written by process {holder}; stop that training, or name another folder"
            ) from None
        with contextlib.suppress(OSError):  # who it is, is only for the message
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def release(self) -> None:
        """Lets the next writer in. Releasing twice does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()
