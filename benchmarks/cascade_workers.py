"""The trials of `geodiag bench cascade` in parallel, each trained and graded in its own process."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geodiag.benchmarks.cascade_grades import line_of
from geodiag.benchmarks.cascade_trials import CLEAN_STEPS, Trial, train
from geodiag.benchmarks.report import setting, where

_TWIN = 300
"""Seconds that a twin, which began earlier, may take longer than the fault."""


@dataclass(frozen=True)
class Work:
    """How trials are trained, and where their runs are kept."""

    folder: Path
    sequences: int
    device: str

    def __call__(self, trial: Trial) -> dict[str, Any]:
        """Return the line of a trial; train it first, unless its run exists."""
        try:
            train(trial, self.folder, self.sequences, self.device)
            self._await(self.folder / trial.twin, trial)
            return line_of(trial, self.folder) | {
                "place": where(setting("cascade", [], self.device))
            }
        except Exception as e:  # a failed trial is reported, and the others go on
            return {"name": trial.name, "failed": f"{type(e).__name__}: {e}"}

    def _await(self, twin: Path, trial: Trial) -> None:
        ends = time.monotonic() + _TWIN
        while trial.kind is not None and not twin.is_dir() and time.monotonic() < ends:
            time.sleep(0.2)


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Sort the trials: twins first, because grades need them; then longest first; then by seed."""
    return sorted(trials, key=lambda t: (t.kind is not None, t.steps == CLEAN_STEPS, t.seed))


def lines_of(
    trials: Sequence[Trial], work: Work, workers: int, minutes: float, kept: Path
) -> Iterator[dict[str, Any]]:
    """Yield the line of each finished trial and append it to `kept`, until the time is up."""
    work.folder.mkdir(parents=True, exist_ok=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which the processes inherit: one core each
    ends = time.monotonic() + 60 * minutes
    with multiprocessing.get_context("spawn").Pool(workers) as pool, kept.open("a") as file:
        results = pool.imap_unordered(work, in_order(trials))
        while (left := ends - time.monotonic()) > 0:
            try:
                line = results.next(timeout=left)
            except (StopIteration, multiprocessing.TimeoutError):
                break
            if "failed" not in line:
                print(json.dumps(line), file=file, flush=True)
            yield line
