"""One run as the pages see it: its tables held dense in memory, and brought up to date by reading
only the tail.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from geodiag.dashboard.data.attempt_view import PastRun
from geodiag.dashboard.data.grid import SECOND_KEY, Grid, concatenate, extend, to_grids
from geodiag.dashboard.data.step_table import SupersededSteps, merge_step_rows, superseded_of
from geodiag.errors import GeodiagError
from geodiag.metrics.schema import ROUTING_MODES
from geodiag.run import Run
from geodiag.store.files import Folder
from geodiag.store.manifest import known_starts
from geodiag.store.reader import Steps
from geodiag.store.step_chunks import stretches

# S steps, R rows.

_KEPT = 24
_REREAD = 64
"""Steps read again at each refresh: ranks write at their own pace."""
_WATCHED = ("run.json", "control.json", "heartbeat.json")


class RunCache:
    """A run's tables, cached. Safe to use from several threads."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._lock = threading.RLock()
        self._stamp: tuple = ()
        self._grids: dict[tuple[str, str], Grid] = {}
        self._steps: dict[str, np.ndarray] | None = None
        self._events: list[dict[str, Any]] | None = None
        self._memos: dict[Hashable, Any] = {}
        self._kept: dict[Hashable, Any] = {}

    def refresh(self) -> str:
        """Looks whether the run changed on disk and reads what is new. Returns a mark of the
        version.
        """
        with self._lock:
            stamp = self._files_stamp()
            if stamp != self._stamp:
                known, self.run = self.run.manifest.get("attempts"), _reopened(self.run)
                if self.run.manifest.get("attempts") != known:
                    self._grids, self._steps = {}, None  # a new attempt takes the place of old rows
                self._events, self._memos = None, {}
                self._read_tails()
                self._stamp = stamp
            return f"{hash(self._stamp) & 0xFFFFFFFF:08x}"

    def steps(self) -> dict[str, np.ndarray]:
        """Table `steps`, ranks merged: column → values; `routing_mode` as indices into
        ROUTING_MODES, −1 for none.
        """
        with self._lock:
            if self._steps is None:
                self._steps = merge_step_rows(self.run.read_arrow("steps"))
            return self._steps

    def mode(self) -> str:
        """The newest routing mode; `off` where a step does not say."""
        mode_S = self.steps()["routing_mode"]
        return ROUTING_MODES[mode_S[-1]] if len(mode_S) and mode_S[-1] >= 0 else "off"

    def superseded(self) -> list[SupersededSteps]:
        """What was rolled back, or lost to a resume: one entry an attempt, oldest first."""
        return self.memo("superseded", lambda: superseded_of(self.run))

    def as_of_attempt(self, attempt: int | None) -> "RunCache":
        """The run as it stood when `attempt` was its newest; itself for None and for the newest
        attempt.
        """
        starts = self.attempt_starts()
        if attempt is None or attempt not in starts or attempt == max(starts):
            return self
        return self.kept(("lived", attempt), lambda: RunCache(PastRun.of(self.run, attempt)))

    def grids(self, table: str, *names: str) -> list[Grid]:
        """The named metrics of `layers` or `experts`, in the order asked for."""
        with self._lock:
            missing = [n for n in names if (table, n) not in self._grids]
            if missing:
                self._grids |= {
                    (table, n): g for n, g in self._read_all_steps(table, missing).items()
                }
            return [self._grids[table, n] for n in names]

    def events(self) -> list[dict[str, Any]]:
        """The audit trail, oldest first."""
        with self._lock:
            if self._events is None:
                rows = self.run.read_arrow("events").to_pylist()
                self._events = sorted(rows, key=lambda e: (e["time"] or 0, e["step"]))
            return self._events

    def recent(self, table: str, *names: str, back: int = 100) -> list[Grid]:
        """Like `grids`, for the last `back` steps only; costs a glance, however long the run."""
        with self._lock:
            steps_S = self.steps()["step"]
            first = int(steps_S[-1]) - back + 1 if len(steps_S) else 0
            if all((table, n) in self._grids for n in names):
                return [self._grids[table, n].window(first, None) for n in names]
            made = self._read_grids(table, list(names), (first, None))
            return [made[n] for n in names]

    def memo(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, made once for each version of the run."""
        with self._lock:
            if key not in self._memos:
                self._memos[key] = make()
            return self._memos[key]

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returns, for as long as the key says everything that it depends on; the last
        few are kept.
        """
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= _KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = make()
            return self._kept[key]

    def read_steps(self, table: str, names: Sequence[str], first: int, last: int) -> list[Grid]:
        """The named metrics of `layers` or `experts` from step `first` to `last`, without reading
        the rest.
        """
        made = self._read_grids(table, list(names), (max(0, first), last + 1))
        return [made[n] for n in names]

    def said(self, key: str) -> dict[str, Any]:
        """A part of the manifest, empty where it is missing or makes no sense."""
        found = self.run.manifest.get(key)
        return found if isinstance(found, dict) else {}

    def attempt_starts(self) -> dict[int, int]:
        """Attempt → its first step, as the manifest knows them."""
        return known_starts(self.run.manifest)

    def has_maps(self) -> bool:
        """Whether the model has residual maps at all, as far as the manifest says."""
        found = self.said("found")
        return bool(found.get("sites", True)) and found.get("streams") != 1

    def option(self, key: str) -> Any:
        """What the training was told, wherever its manifest says it; None where it does not."""
        config = self.said("config")
        for place in (config, config.get("options"), config.get("model")):
            if isinstance(place, dict) and isinstance(place.get(key), str | int | float):
                return place[key]
        return None

    def problems(self) -> dict[str, str]:
        """What could not be read, file → why."""
        return dict(self.run.problems)

    def _read_all_steps(self, table: str, names: list[str]) -> dict[str, Grid]:
        """The named metrics of every step, a stretch at a time: rows take several times the room of
        their grid.
        """
        steps_S = self.steps()["step"]
        first, last = (int(steps_S[0]), int(steps_S[-1])) if len(steps_S) else (0, 0)
        parts = [
            self._read_grids(table, names, read_steps)
            for read_steps in stretches(
                self.run, table, len(_keys(table)) + len(names), first, last
            )
        ]
        grids = {n: concatenate([p[n] for p in parts]) for n in names}
        known = {n: g for n, g in grids.items() if g is not None}
        return known if len(known) == len(names) else self._read_grids(table, names, None)

    def _read_grids(self, table: str, names: list[str], steps: Steps | None) -> dict[str, Grid]:
        rows = self.run.read_arrow(table, [*_keys(table), *names], steps)
        return to_grids(table, rows, names)

    def _read_tails(self) -> None:
        if self._steps is not None:
            self._steps = None  # one small table: whole is as quick as the tail
        for table in SECOND_KEY:
            names = [n for t, n in self._grids if t == table]
            if not names:
                continue
            last = [s[-1] for n in names if len(s := self._grids[table, n].steps_S)]
            first = int(min(last)) - _REREAD if len(last) == len(names) else None
            for name, tail in self._read_grids(table, names, (first, None)).items():
                grids = extend(self._grids[table, name], tail)
                if grids is None:
                    del self._grids[
                        table, name
                    ]  # other rows than before: read it anew when it is asked for
                else:
                    self._grids[table, name] = grids

    def _files_stamp(self) -> tuple:
        store = Folder.of(self.run.url)
        seen = []
        for folder in (store.root, store.path("journal")):
            try:
                entries = store.fs.ls(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            for e in entries:
                name = e["name"].rsplit("/", 1)[-1]
                if folder != store.root or name in _WATCHED:
                    seen.append((name, e.get("size"), e.get("mtime")))
        return tuple(sorted(seen, key=str))


def _keys(table: str) -> list[str]:
    return ["rank", "step", "layer", SECOND_KEY[table]]


def _reopened(run: Run) -> Run:
    try:
        fresh = run.refresh()
    except GeodiagError:
        return run  # the folder went away while it was looked at; what we hold is still true
    fresh.problems |= {k: v for k, v in run.problems.items() if k not in fresh.problems}
    return fresh
