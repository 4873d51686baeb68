"""Onsets: when did a place leave its range for good, told by a running sum and walked back to where
it began.
"""

from typing import NamedTuple

import numpy as np

ALLOWED = 3.5
"""Score up to which a sample counts against an excursion."""
ALARM = 10.0
"""Summed excess from which an excursion is one: three samples at 7, or one at 14."""
_LARGEST = 30.0  # one wild sample is one sample
_MEMORY = (
    2 * ALARM
)  # so an excursion ends a few samples after the last excess, however long it lasted
_JUDGED = 5


class Excursion(NamedTuple):
    """A stretch of samples out of range."""

    start: int
    alarm: int
    end: int
    strength: float
    """Mean score of the first samples, the wild ones cut: what persists is stronger than what
    flickers.
    """


def excursions(
    score_S: np.ndarray, allowed: float = ALLOWED, alarm: float = ALARM
) -> list[Excursion]:
    """Every excursion in a series of scores, as places in it; NaN is not sampled and decides
    nothing.
    """
    known = np.flatnonzero(~np.isnan(score_S))
    found: list[Excursion] = []
    if not (score_S[known] > allowed).any():
        return found  # nearly every place of nearly every window
    total, start, raised = 0.0, 0, -1
    excess = (np.minimum(score_S[known], _LARGEST) - allowed).tolist()
    for i, more in enumerate(excess):
        if more > 0 and (i == 0 or excess[i - 1] <= 0) and raised < 0:
            start = i  # what rose before this and fell back is noise, whatever it left in the sum
        total = min(total + more, _MEMORY)
        if total <= 0:
            if raised >= 0:
                found.append(_excursion(score_S, known[start], known[raised], known[i]))
            total, raised = 0.0, -1
        elif raised < 0 and total >= alarm:
            raised = i
    if raised >= 0:
        found.append(_excursion(score_S, known[start], known[raised], len(score_S)))
    return found


def _excursion(score_S: np.ndarray, start: int, raised: int, end: int) -> Excursion:
    start, raised, end = int(start), int(raised), int(end)
    rows = score_S[start : max(end, raised + 1)]
    rows = rows[~np.isnan(rows)][:_JUDGED]
    padded = np.minimum(np.append(rows, np.zeros(max(0, 2 - len(rows)))), 3 * _LARGEST)
    return Excursion(start, raised, end, float(padded.mean()))
