"""External causes, which are not in any layer: the batch and the learning rate."""

from dataclasses import dataclass

import numpy as np

from geodiag.cascade.scored_window import ScoredWindow
from geodiag.run import Run

LR_JUMP = 1.3
"""Ratio of a learning rate to the continuation of its schedule that is a jump."""
_CREEP = 8
"""Rows between the points from which a slow rise is extrapolated. A rise of 5 % per step becomes a
jump over such a distance; a warm-up does not.
"""
_DOMAIN_RISE = 0.3
"""Least rise of a domain's share of the tokens; less is chance."""
LR_REACH = 24
"""Steps before the first excursion, or before the loss if there is none, in which a learning rate
can be the cause.
"""
OWN_STRENGTH = 20.0
"""Strength of an earlier excursion from which it stays the origin in spite of a later jump of the
learning rate.
"""


@dataclass(frozen=True, kw_only=True)
class LearningRateJump:
    """A learning rate that left its own schedule."""

    row: int
    """The first row off the schedule."""
    value: float
    usual: float
    """The value that its schedule was heading for."""

    @property
    def ratio(self) -> float:
        return self.value / self.usual if self.usual > 0 else np.inf


def find_lr_jump(window: ScoredWindow, first: int, last: int) -> LearningRateJump | None:
    """Return the first jump of the learning rate from row `first` to `last`; None if there is none.

    A jump is found from the line through the last two steps, a slow rise from the line through two
    points farther back.
    """
    lr = window.recorded.outcome.get("lr", np.full(len(window.step_S), np.nan))
    for i in range(max(first, 2), min(last, len(lr) - 1) + 1):
        expected = _extrapolate(lr, i - 2, i - 1, i)
        if lr[i] > LR_JUMP * expected:
            return LearningRateJump(row=i, value=float(lr[i]), usual=expected)
        if lr[i] > lr[i - 1] and lr[i] > LR_JUMP * _extrapolate(
            lr, i - 3 * _CREEP, i - 2 * _CREEP, i
        ):
            row = _start_of_rise(lr, i)
            return LearningRateJump(row=row, value=float(lr[i]), usual=float(lr[row - 1]))
    return None


def _extrapolate(lr: np.ndarray, older: int, newer: int, row: int) -> float:
    """Return the line through two rows at a third row; NaN if unknown.

    A falling rate is continued at its last value.
    """
    # expected = lr[newer] + max(slope, 0) · distance: a schedule whose decay ends is no jump.
    if older < 0 or not (np.isfinite(lr[older]) and lr[newer] > 0):
        return float("nan")
    return float(lr[newer] + max(lr[newer] - lr[older], 0.0) * (row - newer) / (newer - older))


def _start_of_rise(lr: np.ndarray, i: int) -> int:
    """Return the first row of the unbroken rise that includes row `i`."""
    while i > 1 and lr[i - 1] < lr[i]:
        i -= 1
    return i + 1


def suspect_domain(
    run: Run, window: ScoredWindow, row: int, attempt: int | None, after: int = 5
) -> str | None:
    """Return the domain whose share of the tokens suddenly rose at row `row`.

    None if no share rose enough, or if the run has no domains.
    """
    if row >= len(window.step_S):
        return None
    onset = int(window.step_S[row])
    last = int(window.step_S[min(row + after, len(window.step_S) - 1)])
    if attempt is not None:
        run = run.as_of_attempt(attempt)
    rows = run.read_arrow("domains", ["step", "domain", "tokens"], (max(0, onset - 64), last + 1))
    step = rows["step"].to_numpy()
    tokens = rows["tokens"].to_numpy()
    names = np.array(rows["domain"].to_pylist(), object)
    now = step >= onset
    before = step < onset
    if not now.any() or not before.any():
        return None

    def share(chosen: np.ndarray, name: str) -> float:
        total = max(np.nansum(tokens[chosen]), 1.0)
        return float(np.nansum(tokens[chosen & (names == name)]) / total)

    rise = {n: share(now, n) - share(before, n) for n in set(names[now])}
    most = max(rise, key=lambda n: rise[n])
    return str(most) if rise[most] > _DOMAIN_RISE else None
