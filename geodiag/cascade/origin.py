"""The origin of a cascade: the first place out of range that no earlier place explains."""

from dataclasses import dataclass, replace

import numpy as np

from geodiag.anomaly.excursions import Excursion, excursions
from geodiag.anomaly.metric_roles import SeriesPlace
from geodiag.cascade.scored_window import ScoredWindow

EXPLAINING_SHARE = 0.25
"""An earlier place explains a later one if its weight is at least this share of the later one's."""
MIN_STRENGTH = 5.0
"""Least strength of an origin."""
LINK = 12
"""Most steps between the end of an excursion and the loss at which they can be related."""
MIN_DRIFT = 10.0
"""Least score of a slow drift, against the baselines at the start of the window."""
_DRIFT_SAMPLES = 8
"""Samples that a slow drift must last, and over which its score is averaged."""
_DRIFT_REACH = 60
"""Rows before the loss in which a slow drift must begin: longer drifts are part of any training."""
_DRIFT_GROWTH = 1.15
"""Least growth of a slow drift over its last samples: one that has settled is not a fault."""
_MAX_WEIGHT = 40.0
"""Strength from which a larger one adds no weight."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A place that left its range before the loss did."""

    place: SeriesPlace
    start: int
    """Row of the window at which it left its range."""
    strength: float
    explained: bool = False
    """True if an earlier candidate can have caused it."""

    @property
    def weight(self) -> float:
        return min(self.strength, _MAX_WEIGHT)

    def before(self, other: "Candidate") -> bool:
        """Return True if it can have caused `other`: earlier, or upstream in the same step."""
        # Cause and effect run from step to step, and inside a step along the order of computation:
        # forward through the layers, then backward. So (step, order) decides.
        return (self.start, self.place.order) < (other.start, other.place.order)


def find_candidates(window: ScoredWindow, row: int, last: int) -> list[Candidate]:
    """Return the excursions that begin by row `last` and last until shortly before `row`, in order.

    row: the row at which the loss left its trend.
    """
    steps = window.step_S
    onset = 0
    if row < len(steps):
        onset = steps[row]
    elif len(steps):
        onset = steps[-1] + 1

    found = []
    for k, place in enumerate(window.places):
        for excursion in excursions(window.score_SK[:, k]):
            in_window = window.first <= excursion.start <= last
            strong = excursion.strength >= MIN_STRENGTH
            if in_window and strong and _end_step(excursion, steps) >= onset - LINK:
                found.append(
                    Candidate(place=place, start=excursion.start, strength=excursion.strength)
                )
    return sorted(found, key=lambda c: (c.start, c.place.order))


def _end_step(excursion: Excursion, step_S: np.ndarray) -> float:
    return float(step_S[excursion.end]) if excursion.end < len(step_S) else np.inf


def find_slow_drifts(window: ScoredWindow, row: int) -> list[Candidate]:
    """Return the places that drifted far from the start of the window, and still drift.

    The window must be scored by `score_against_start`.
    """
    found = []
    for c in find_candidates(window, row, row - _DRIFT_SAMPLES):
        scores = window.score_SK[:row, window.places.index(c.place)]
        known = scores[~np.isnan(scores)][-4 * _DRIFT_SAMPLES :]
        now = float(np.median(known[-_DRIFT_SAMPLES:]))
        before = float(np.median(known[:_DRIFT_SAMPLES]))
        growing = now > _DRIFT_GROWTH * before
        if now >= MIN_DRIFT and growing and c.start >= row - _DRIFT_REACH:
            found.append(replace(c, strength=now))
    return found


def rank_origins(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that can be the origin, the likeliest first and explained ones last.

    Streams and composite gains accumulate over layers, so that they are never an origin.
    """
    # Idea: A explains B if A is before B and weight(A) ≥ 0.25 · weight(B). The origin is the
    # heaviest candidate that nothing explains.
    possible = [c for c in candidates if c.place.part != "stream"]
    ranked = []
    for c in possible:
        explained = any(d.before(c) and d.weight >= EXPLAINING_SHARE * c.weight for d in possible)
        ranked.append(replace(c, explained=explained))
    return sorted(ranked, key=lambda c: (c.explained, -c.weight, c.start, c.place.order))
