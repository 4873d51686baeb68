"""Excursions: the stretches in which a series of scores is out of range, and where each began."""

from typing import NamedTuple

import numpy as np

ALLOWED = 3.5
"""Score up to which a sample counts against an excursion."""
ALARM = 10.0
"""Summed excess that makes an excursion: three samples at a score of 7, or one at 14."""
_MAX_SAMPLE = 30.0
"""Score at which one sample is cut, so that one extreme sample counts as one sample."""
_MAX_SUM = 2 * ALARM
"""Bound on the sum, so that an excursion ends a few samples after the last excess, however long it
lasted.
"""
_STRENGTH_SAMPLES = 5
"""Samples at the start of an excursion that its strength is averaged over."""


class Excursion(NamedTuple):
    """A stretch of samples out of range, as indices into the series of scores."""

    start: int
    """The first sample out of range."""
    alarm: int
    """The sample at which the summed excess reached the alarm."""
    end: int
    """The first sample after it; the length of the series if it is not over."""
    strength: float
    """Mean score of the first samples, extreme ones cut. A lasting excess is stronger than a short
    one.
    """


def excursions(
    score_S: np.ndarray, allowed: float = ALLOWED, alarm: float = ALARM
) -> list[Excursion]:
    """Return every excursion in a series of scores; NaN (not sampled) is skipped."""
    known = np.flatnonzero(~np.isnan(score_S))
    found: list[Excursion] = []
    if not (score_S[known] > allowed).any():
        return found  # the common case, which must be fast

    # Idea: a one-sided cumulative sum (CUSUM): S[t] = max(0, S[t-1] + score − allowed), alarm at
    # S ≥ alarm; the change is dated to the start of the rise (Page 1954, Biometrika 41).
    total = 0.0
    start = 0
    raised = -1  # the sample that reached the alarm; -1 before it
    excess = (np.minimum(score_S[known], _MAX_SAMPLE) - allowed).tolist()
    for i, more in enumerate(excess):
        if more > 0 and (i == 0 or excess[i - 1] <= 0) and raised < 0:
            start = i  # an earlier rise that fell back was noise, even if the sum is not 0 yet
        total = min(total + more, _MAX_SUM)
        if total <= 0:
            if raised >= 0:
                found.append(_excursion(score_S, known[start], known[raised], known[i]))
            total = 0.0
            raised = -1
        elif raised < 0 and total >= alarm:
            raised = i
    if raised >= 0:
        found.append(_excursion(score_S, known[start], known[raised], len(score_S)))
    return found


def _excursion(score_S: np.ndarray, start: int, raised: int, end: int) -> Excursion:
    """Return the excursion with its strength; a single sample counts half."""
    start, raised, end = int(start), int(raised), int(end)
    scores = score_S[start : max(end, raised + 1)]
    scores = scores[~np.isnan(scores)][:_STRENGTH_SAMPLES]
    padded = np.append(scores, np.zeros(max(0, 2 - len(scores))))
    strength = np.minimum(padded, 3 * _MAX_SAMPLE).mean()
    return Excursion(start, raised, end, float(strength))
