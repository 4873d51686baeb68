"""What is being served: one run, or a folder of runs that is looked at anew for each list."""

import os
import threading
from urllib.parse import unquote

from geodiag.dashboard.data.run_cache import RunCache
from geodiag.errors import GeodiagError
from geodiag.run import Run, find_runs


class RunLibrary:
    """Runs by name. GeodiagError at once where `path` holds none."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._caches: dict[str, RunCache] = {}
        runs = find_runs(path)
        self.single = runs[0].name if len(runs) == 1 and runs[0].url == self.path else None
        """The run's name, where `path` is a run itself and not a folder of them."""
        self._take(runs)

    def names(self) -> list[str]:
        """Names of the runs that are there now."""
        if self.single is None:
            try:
                found = find_runs(self.path)
            except GeodiagError:
                found = []  # the last run was just moved away
            self._take(found)
            return [r.name for r in found]
        return [self.single]

    def get(self, name: str) -> RunCache | None:
        """The run called `name`, up to date, or None where there is none."""
        if name not in self._caches:
            self.names()
        cache = self._caches.get(name)
        if cache is not None:
            cache.refresh()
        return cache

    def at(self, pathname: str | None) -> RunCache | None:
        """The run that an address such as `/run/NAME/gain` speaks of."""
        parts = [unquote(p) for p in (pathname or "").strip("/").split("/")]
        return self.get(parts[1]) if len(parts) > 1 and parts[0] == "run" else None

    def _take(self, runs: list[Run]) -> None:
        with self._lock:
            for run in runs:
                self._caches.setdefault(run.name, RunCache(run))
