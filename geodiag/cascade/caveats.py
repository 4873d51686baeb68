"""Caveats: gaps in a record that make its cascade less certain, each in one phrase."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from geodiag.cascade.scored_window import ScoredWindow
from geodiag.run import Run
from geodiag.spikes.recorded import RecordedSpike
from geodiag.store.manifest import known_starts

ENOUGH = 32
"""Samples before the loss that are enough to know the normal range."""
_HOLE = 3
"""Gap between samples, in usual gaps, that counts as a hole."""

_MISSING = {
    "experts": ("no expert can be named", 0.9),
    "layers": ("no layer can be named", 0.2),
    "steps": ("the loss is unknown", 0.2),
}
"""Table → the consequence of its absence, and the trust that is left."""


class Caveat(NamedTuple):
    """One gap in the record."""

    words: str
    trust: float
    """Factor on the confidence of the cascade."""


def caveats(
    run: Run, window: ScoredWindow, spike: RecordedSpike, others: Sequence[RecordedSpike]
) -> list[Caveat]:
    """Return every caveat about the record of a cascade."""
    return [
        *(_missing_table(table) for table in window.recorded.missing),
        *_sampling(window, spike.onset),
        *_missing_ranks(run, window),
        *_later_attempts(run, spike),
        *_open_spikes(spike, others),
        *(Caveat(f"{piece} could not be read: {why}", 0.9) for piece, why in run.problems.items()),
    ]


def _missing_table(table: str) -> Caveat:
    consequence, trust = _MISSING[table]
    return Caveat(f"the table {table} has no rows here, so {consequence}", trust)


def _sampling(window: ScoredWindow, onset: int) -> list[Caveat]:
    """Return caveats about too few samples, or samples that are far apart."""
    steps = window.step_S[window.recorded.sampled_S]
    before = steps[steps < onset]
    count = len(before)
    if count < ENOUGH:
        samples = {0: "no samples", 1: "only one sample"}.get(count, f"only {count} samples")
        words = f"{samples} before the loss, so the normal range is uncertain"
        return [Caveat(words, max(0.1, count / 64))]

    recent = before[-4 * ENOUGH :]
    gaps = np.diff(recent)
    usual = int(np.median(gaps))
    found = []
    if usual > 1:
        cadence = f"layers were sampled every {usual} steps"
        words = f"{cadence}, so the onset may be up to {usual - 1} steps earlier"
        found.append(Caveat(words, 0.9))
    for i in np.flatnonzero(gaps > _HOLE * usual):
        first = int(recent[i]) + 1
        last = int(recent[i]) + int(gaps[i]) - 1
        found.append(Caveat(f"nothing was sampled from step {first:,} to {last:,}", 0.8))
    if onset - before[-1] > _HOLE * usual:
        words = f"nothing was sampled from step {int(before[-1]) + 1:,} until the loss changed"
        found.append(Caveat(words, 0.5))
    return found


def _missing_ranks(run: Run, window: ScoredWindow) -> list[Caveat]:
    world = run.manifest.get("world_size")
    present = window.recorded.ranks
    if isinstance(world, int) and 1 < present < world:
        return [Caveat(f"{world - present} of {world} ranks recorded no rows here", 0.8)]
    return []


def _later_attempts(run: Run, spike: RecordedSpike) -> list[Caveat]:
    if spike.attempt is None:
        return []
    later = [
        attempt
        for attempt, first in known_starts(run.manifest).items()
        if attempt > spike.attempt and first <= spike.onset
    ]
    if not later:
        return []
    words = f"the training later restarted before this step; this describes attempt {spike.attempt}"
    return [Caveat(words, 1.0)]


def _open_spikes(spike: RecordedSpike, others: Sequence[RecordedSpike]) -> list[Caveat]:
    """Return a caveat if an earlier spike of the same attempt was not over."""
    for other in others:
        if other.spike is None or other.attempt != spike.attempt or other.onset >= spike.onset:
            continue
        if other.spike.end is None or other.spike.end > spike.onset:
            words = f"the {other.spike.kind} that began at step {other.onset:,} was not over"
            return [Caveat(words, 0.8)]
    return []
