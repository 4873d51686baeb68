"""Tables of one run in memory as dense arrays. A refresh reads only the newest steps."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from geodiag.dashboard.data.grid import SECOND_KEY, Grid, concatenate, extend, to_grids
from geodiag.dashboard.data.step_table import SupersededSteps, merge_step_rows, superseded_of
from geodiag.errors import GeodiagError
from geodiag.metrics.schema import ROUTING_MODES
from geodiag.run import Run
from geodiag.store.files import Folder
from geodiag.store.manifest import known_starts
from geodiag.store.reader import Steps
from geodiag.store.step_chunks import step_chunks

# S steps, R rows.

_MOST_CACHED = 24
_REREAD = 64
"""Steps that each refresh reads again, because ranks write at different speeds."""
_WATCHED = ("run.json", "control.json", "heartbeat.json")


class RunCache:
    """Cached tables of one run. Safe to use from several threads."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._stamp: tuple = ()
        self._grids: dict[tuple[str, str], Grid] = {}
        self._steps: dict[str, np.ndarray] | None = None
        self._events: list[dict[str, Any]] | None = None
        self._memos: dict[Hashable, Any] = {}
        self._cached: dict[Hashable, Any] = {}

    def refresh(self) -> str:
        """Read what is new on disk. Return a string that changes whenever the run changes."""
        with self._lock:
            stamp = self._files_stamp()
            if stamp != self._stamp:
                old_attempts = self.run.manifest.get("attempts")
                self.run = _reopened(self.run)
                if self.run.manifest.get("attempts") != old_attempts:
                    # Rows of the new attempt replace rows of the old one.
                    self._grids = {}
                    self._steps = None
                self._events = None
                self._memos = {}
                self._read_tails()
                self._stamp = stamp
            return f"{hash(self._stamp) & 0xFFFFFFFF:08x}"

    def steps(self) -> dict[str, np.ndarray]:
        """Return table `steps` by column, ranks merged.

        `routing_mode` holds indices into ROUTING_MODES, −1 where the mode is unknown.
        """
        with self._lock:
            if self._steps is None:
                self._steps = merge_step_rows(self.run.read_arrow("steps"))
            return self._steps

    def routing_mode(self) -> str:
        """Return the newest routing mode; `off` where the mode was not recorded."""
        mode_S = self.steps()["routing_mode"]
        return ROUTING_MODES[mode_S[-1]] if len(mode_S) and mode_S[-1] >= 0 else "off"

    def superseded(self) -> list[SupersededSteps]:
        """Return the steps that later attempts replaced: one entry per attempt, oldest first."""
        return self.memo("superseded", lambda: superseded_of(self.run))

    def as_of_attempt(self, attempt: int | None) -> "RunCache":
        """Return the run as it was when `attempt` was the newest one.

        Return the cache itself for None and for the newest attempt.
        """
        starts = self.attempt_starts()
        if attempt is None or attempt not in starts or attempt == max(starts):
            return self
        return self.cached(("attempt", attempt), lambda: RunCache(self.run.as_of_attempt(attempt)))

    def grids(self, table: str, *names: str) -> list[Grid]:
        """Return the named metrics of table `layers` or `experts`, in the given order."""
        with self._lock:
            missing = [n for n in names if (table, n) not in self._grids]
            if missing:
                self._grids |= {
                    (table, n): g for n, g in self._read_all_steps(table, missing).items()
                }
            return [self._grids[table, n] for n in names]

    def events(self) -> list[dict[str, Any]]:
        """Return the rows of table `events`, oldest first."""
        with self._lock:
            if self._events is None:
                rows = self.run.read_arrow("events").to_pylist()
                self._events = sorted(rows, key=lambda e: (e["time"] or 0, e["step"]))
            return self._events

    def recent(self, table: str, *names: str, back: int = 100) -> list[Grid]:
        """Return the same as `grids` for the last `back` steps, without reading the others."""
        with self._lock:
            steps_S = self.steps()["step"]
            first = int(steps_S[-1]) - back + 1 if len(steps_S) else 0
            if all((table, n) in self._grids for n in names):
                return [self._grids[table, n].window(first, None) for n in names]
            made = self._read_grids(table, list(names), (first, None))
            return [made[n] for n in names]

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, computed once for each version of the run."""
        with self._lock:
            if key not in self._memos:
                self._memos[key] = make()
            return self._memos[key]

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the result of `make` from a small cache that outlives versions of the run.

        `key` must hold everything that the result depends on.
        """
        with self._lock:
            if key not in self._cached:
                while len(self._cached) >= _MOST_CACHED:
                    self._cached.pop(next(iter(self._cached)))
                self._cached[key] = make()
            return self._cached[key]

    def read_steps(self, table: str, names: Sequence[str], first: int, last: int) -> list[Grid]:
        """Return the named metrics from step `first` to `last`, without reading the others."""
        made = self._read_grids(table, list(names), (max(0, first), last + 1))
        return [made[n] for n in names]

    def manifest_section(self, key: str) -> dict[str, Any]:
        """Return a section of the manifest; empty if it is missing or not an object."""
        found = self.run.manifest.get(key)
        return found if isinstance(found, dict) else {}

    def attempt_starts(self) -> dict[int, int]:
        """Return the first step of each attempt in the manifest."""
        return known_starts(self.run.manifest)

    def has_maps(self) -> bool:
        """True unless the manifest shows that the model has no residual maps."""
        found = self.manifest_section("found")
        return bool(found.get("sites", True)) and found.get("streams") != 1

    def setting(self, key: str) -> Any:
        """Return a setting of the training from the manifest, None if it is not there."""
        config = self.manifest_section("config")
        for section in (config, config.get("options"), config.get("model")):
            if isinstance(section, dict) and isinstance(section.get(key), str | int | float):
                return section[key]
        return None

    def problems(self) -> dict[str, str]:
        """Return the files that could not be read, each with the reason."""
        return dict(self.run.problems)

    def _read_all_steps(self, table: str, names: list[str]) -> dict[str, Grid]:
        """Return the named metrics of every step.

        Read in chunks of steps, because table rows need several times the memory of a grid.
        """
        steps_S = self.steps()["step"]
        first, last = (int(steps_S[0]), int(steps_S[-1])) if len(steps_S) else (0, 0)
        parts = [
            self._read_grids(table, names, chunk)
            for chunk in step_chunks(self.run, table, len(_keys(table)) + len(names), first, last)
        ]
        grids = {n: concatenate([p[n] for p in parts]) for n in names}
        known = {n: g for n, g in grids.items() if g is not None}
        return known if len(known) == len(names) else self._read_grids(table, names, None)

    def _read_grids(self, table: str, names: list[str], steps: Steps | None) -> dict[str, Grid]:
        rows = self.run.read_arrow(table, [*_keys(table), *names], steps)
        return to_grids(table, rows, names)

    def _read_tails(self) -> None:
        if self._steps is not None:
            self._steps = None  # a small table: read again as a whole at next use
        for table in SECOND_KEY:
            names = [n for t, n in self._grids if t == table]
            if not names:
                continue
            last = [s[-1] for n in names if len(s := self._grids[table, n].steps_S)]
            first = int(min(last)) - _REREAD if len(last) == len(names) else None
            for name, tail in self._read_grids(table, names, (first, None)).items():
                extended = extend(self._grids[table, name], tail)
                if extended is None:
                    # The rows are not the same as before: read the whole grid at next use.
                    del self._grids[table, name]
                else:
                    self._grids[table, name] = extended

    def _files_stamp(self) -> tuple:
        store = Folder.of(self.run.url)
        stamps = []
        for folder in (store.root, store.path("journal")):
            try:
                entries = store.fs.ls(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for e in entries:
                name = e["name"].rsplit("/", 1)[-1]
                if folder != store.root or name in _WATCHED:
                    stamps.append((name, e.get("size"), e.get("mtime")))
        return tuple(sorted(stamps, key=str))


def _keys(table: str) -> list[str]:
    return ["rank", "step", "layer", SECOND_KEY[table]]


def _reopened(run: Run) -> Run:
    try:
        fresh = run.refresh()
    except GeodiagError:
        return run  # the folder was removed meanwhile; the cached values stay valid
    fresh.problems |= {k: v for k, v in run.problems.items() if k not in fresh.problems}
    return fresh
