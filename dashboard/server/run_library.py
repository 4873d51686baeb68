"""The runs that are served: one run, or a folder that is scanned again for each list."""

import os
import threading
from urllib.parse import unquote

from geodiag.dashboard.data.run_cache import RunCache
from geodiag.errors import GeodiagError
from geodiag.run import Run, find_runs


class RunLibrary:
    """Caches of the runs at `path`, by name. GeodiagError if there is no run."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        self._caches: dict[str, RunCache] = {}
        runs = find_runs(path)
        self.single = runs[0].name if len(runs) == 1 and runs[0].url == self.path else None
        """Name of the run if `path` is a run directory and not a folder of runs."""
        self._add(runs)

    def names(self) -> list[str]:
        """Return the names of the runs that exist now."""
        if self.single is None:
            try:
                found = find_runs(self.path)
            except GeodiagError:
                found = []  # the last run was just removed
            self._add(found)
            return [r.name for r in found]
        return [self.single]

    def get(self, name: str) -> RunCache | None:
        """Return the refreshed cache of the run `name`, or None if there is no such run."""
        if name not in self._caches:
            self.names()
        cache = self._caches.get(name)
        if cache is not None:
            cache.refresh()
        return cache

    def at_address(self, pathname: str | None) -> RunCache | None:
        """Return the run of an address such as `/run/NAME/gain`, or None."""
        parts = [unquote(p) for p in (pathname or "").strip("/").split("/")]
        return self.get(parts[1]) if len(parts) > 1 and parts[0] == "run" else None

    def _add(self, runs: list[Run]) -> None:
        with self._lock:
            for run in runs:
                self._caches.setdefault(run.name, RunCache(run))
