"""The origin of a cascade: the first place out of range that nothing before it explains."""

from dataclasses import dataclass, replace

import numpy as np

from geodiag.anomaly.excursions import excursions
from geodiag.anomaly.metric_roles import Place
from geodiag.cascade.stage_map import Judged

EXPLAINS = 0.25
"""A place before another explains it if it stands out this much of what the other does."""
LEAST = 5.0
"""Strength from which a place can be an origin."""
LINK = 12
"""Steps before the loss at which an excursion may be over and still have to do with it."""
DRIFTED = 10.0
"""Score, against long ago, of what moved too slowly to be noticed as it did."""
_SLOW = 8  # samples that it must have lasted, and over which its height is taken
_RECENT = 60  # samples before the loss: what left its range longer ago than that drifts anyway, as trainings do
_GROWS = 1.15  # times its height of a while ago: what has settled elsewhere is no fault that is under way
_ENOUGH = 40.0  # beyond, more says nothing more


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A place that left its range before the loss did."""

    place: Place
    start: int
    """Row of the window at which it did."""
    strength: float
    explained: bool = False

    @property
    def weight(self) -> float:
        return min(self.strength, _ENOUGH)

    def before(self, other: "Candidate") -> bool:
        """Whether this can have caused the other: earlier, or in the same step and upstream."""
        return (self.start, self.place.order) < (other.start, other.place.order)


def candidates(window: Judged, row: int, last: int) -> list[Candidate]:
    """Every excursion in the window that begins by row `last` and still goes on shortly before
    `row`, in time.
    """
    steps, found = window.step_S, []
    onset = steps[row] if row < len(steps) else steps[-1] + 1 if len(steps) else 0
    for k, place in enumerate(window.places):
        for e in excursions(window.at_place_SK[:, k]):
            ended = steps[min(e.end, len(steps) - 1)] if e.end < len(steps) else np.inf
            over = ended < onset - LINK
            if window.first <= e.start <= last and e.strength >= LEAST and not over:
                found.append(Candidate(place=place, start=e.start, strength=e.strength))
    return sorted(found, key=lambda c: (c.start, c.place.order))


def drifts(window: Judged, row: int) -> list[Candidate]:
    """In a window that is held against its beginning: what has been clearly out of range for long,
    and grows still.
    """
    found = []
    for c in candidates(window, row, row - _SLOW):
        scores = window.at_place_SK[:row, window.places.index(c.place)]
        known = scores[~np.isnan(scores)][-4 * _SLOW :]
        now, before = float(np.median(known[-_SLOW:])), float(np.median(known[:_SLOW]))
        if now >= DRIFTED and now > _GROWS * before and c.start >= row - _RECENT:
            found.append(replace(c, strength=now))
    return found


def origins(found: list[Candidate]) -> list[Candidate]:
    """The candidates that may be where it began, the likeliest first; those that others explain go
    last.
    """
    may = [c for c in found if c.place.part != "stream"]
    judged = []
    for c in may:
        explained = any(d.before(c) and d.weight >= EXPLAINS * c.weight for d in may)
        judged.append(replace(c, explained=explained))
    return sorted(judged, key=lambda c: (c.explained, -c.weight, c.start, c.place.order))
