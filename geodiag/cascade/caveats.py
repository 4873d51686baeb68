"""Caveats: what a record lacks, in the words that lower the confidence of what is told from it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from geodiag.cascade.stage_map import Judged
from geodiag.run import Run
from geodiag.spikes.recorded import Seen
from geodiag.store.manifest import known_starts

ENOUGH = 32
"""Samples before the loss from which one can tell what is usual."""
_HOLE = 3
"""Usual distances between samples that make a hole."""


class Caveat(NamedTuple):
    """One thing to keep in mind."""

    words: str
    trust: float
    """Factor on the confidence."""


def caveats(run: Run, window: Judged, seen: Seen, others: Sequence[Seen]) -> list[Caveat]:
    """Everything that a reader of this cascade should know of its record."""
    return [
        *(_missing(t) for t in window.tracks.missing),
        *_sampling(window, seen.onset),
        *_ranks(run, window),
        *_attempts(run, seen),
        *_neighbours(seen, others),
        *(Caveat(f"{piece} could not be read: {why}", 0.9) for piece, why in run.problems.items()),
    ]


def _missing(table: str) -> Caveat:
    means = {
        "experts": "no expert can be named",
        "layers": "no layer can be named",
        "steps": "the loss is not known",
    }
    return Caveat(
        f"table {table} has no rows here: {means[table]}", 0.9 if table == "experts" else 0.2
    )


def _sampling(window: Judged, onset: int) -> list[Caveat]:
    steps = window.step_S[window.tracks.sampled_S]
    before = steps[steps < onset]
    if len(before) < ENOUGH:
        few = {0: "no sample", 1: "only one sample"}.get(len(before), f"only {len(before)} samples")
        return [Caveat(f"{few} before the loss to tell what is usual", max(0.1, len(before) / 64))]
    said, gaps = [], np.diff(before[-4 * ENOUGH :])
    usual = int(np.median(gaps))
    if usual > 1:
        said.append(
            Caveat(
                f"layers were sampled every {usual} steps: an onset may lie {usual - 1} steps earlier",
                0.9,
            )
        )
    for i in np.flatnonzero(gaps > _HOLE * usual):
        first = int(before[-4 * ENOUGH :][i])
        said.append(
            Caveat(
                f"nothing was sampled from step {first + 1:,} to {first + int(gaps[i]) - 1:,}", 0.8
            )
        )
    if onset - before[-1] > _HOLE * usual:
        said.append(
            Caveat(f"nothing was sampled from step {int(before[-1]) + 1:,} to the loss", 0.5)
        )
    return said


def _ranks(run: Run, window: Judged) -> list[Caveat]:
    world = run.manifest.get("world_size")
    there = window.tracks.ranks
    if isinstance(world, int) and 0 < there < world and there > 1:
        return [Caveat(f"{world - there} of {world} ranks left no rows here", 0.8)]
    return []


def _attempts(run: Run, seen: Seen) -> list[Caveat]:
    later = [
        a
        for a, first in known_starts(run.manifest).items()
        if a > (seen.attempt or 0) and first <= seen.onset
    ]
    if seen.attempt is not None and later:
        return [
            Caveat(
                f"the training went back before this step: told as attempt {seen.attempt} lived it",
                1.0,
            )
        ]
    return []


def _neighbours(seen: Seen, others: Sequence[Seen]) -> list[Caveat]:
    for other in others:
        spike = other.spike
        if spike is None or other.attempt != seen.attempt or other.onset >= seen.onset:
            continue
        if spike.end is None or spike.end > seen.onset:
            return [Caveat(f"the {spike.kind} of step {other.onset:,} was not over", 0.8)]
    return []
