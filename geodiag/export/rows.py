"""The rows of an export, a range of steps at a time, because a long run has gigabytes of rows."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from geodiag.errors import GeodiagError
from geodiag.export.selection import Choice
from geodiag.export.wall_times import WallTimes
from geodiag.run import Run
from geodiag.store.reader import Steps
from geodiag.store.step_chunks import step_chunks

CELLS = 1 << 22
"""Numbers in memory at once; each also becomes a text or a point of a curve."""


class Pieces:
    """Iterates over (table, rows) of the selection, in the order of tables and steps."""

    def __init__(self, run: Run, choice: Choice, partial: bool = False) -> None:
        self._run, self._choice, self._partial = run, choice, partial
        running = run.status() == "running"
        clock = run.read_arrow(
            "steps", ["attempt", "step", "step_seconds"], attempt="all", ranks="merged"
        )
        self._check()
        self.times = WallTimes(clock, run.manifest)
        step, attempt = clock["step"].to_numpy(), clock["attempt"].to_numpy()
        self._attempts = ", ".join(str(a) for a in np.unique(attempt).tolist())
        self._ends = (int(step.min()), int(step.max())) if len(step) else None
        self._plan = [(t, s) for t in choice.tables for s in self._step_ranges(t, running)]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[tuple[str, pa.Table]]:
        for table, steps in self._plan:
            yield table, self._read(table, steps)

    def available(self) -> str:
        """Return in words which steps the run has."""
        if self._ends is None:
            return "it recorded no step yet; wait for the first one"
        low, high = self._ends
        return f"it holds steps {low} to {high} of attempt {self._attempts}; choose from these"

    def _step_ranges(self, table: str, running: bool) -> list[Steps]:
        """Return ranges that cover the requested steps, up to the current one of a running run."""
        low, high = self._choice.steps
        if self._ends is None or table == "events":
            return [(low, high)]
        if running:
            high = self._ends[1] + 1 if high is None else min(high, self._ends[1] + 1)
        first = max(self._ends[0], self._ends[0] if low is None else low)
        last = min(self._ends[1], self._ends[1] if high is None else high - 1)
        if first > last:
            return [(low, high)]
        cut = step_chunks(self._run, table, len(self._choice.tables[table]), first, last, CELLS)
        return [(low if a is None else a, high if b is None else b) for a, b in cut]

    def _read(self, table: str, steps: Steps) -> pa.Table:
        choice = self._choice
        attempt = (
            None if choice.attempt == "newest" else choice.attempt
        )  # events keep their whole trail
        rows = self._run.read_arrow(table, choice.tables[table], steps, attempt, choice.ranks)
        self._check()
        return rows

    def _check(self) -> None:
        """Raise GeodiagError where a piece cannot be read, unless the export may be partial."""
        # Problems without a path are about ranks without rows, not about unreadable files.
        torn = [p for p in self._run.problems if "/" in p]
        if torn and not self._partial:
            more = f", and {len(torn) - 1} more" if len(torn) > 1 else ""
            why = self._run.problems[torn[0]]
            raise GeodiagError(
                f"cannot read {torn[0]} of {self._run.url}: {why}{more}; "
                "pass --partial to export the rest"
            )


def moments(rows: pa.Table) -> np.ndarray:
    """Return the first row of each step of each rank and attempt; `rows` are sorted by them."""
    if not len(rows):
        return np.zeros(0, np.int64)
    new = np.ones(len(rows), bool)
    new[1:] = False
    for name in ("rank", "attempt", "step"):
        column = rows[name].to_numpy()
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)
