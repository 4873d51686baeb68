"""Causes that lie in no layer: the batch, and the learning rate."""

from dataclasses import dataclass

import numpy as np

from geodiag.cascade.stage_map import Judged
from geodiag.run import Run

KINK = 1.3
"""A learning rate this many times what its schedule leads to is a kink."""
_APART = 8
"""Rows between the points by which a rate that creeps away is told: 5 % a step is a kink by then, a
warm-up none.
"""
_FULL = 0.3
"""Rise of a domain's share of the tokens that is no chance."""
REACH = 24
"""Steps that a learning rate may have been too high before the first layer, or else the loss,
leaves its range.
"""
OWN = 20.0
"""Strength from which a layer that moved before the learning rate did is the origin all the same.
"""


@dataclass(frozen=True, kw_only=True)
class Kink:
    """A learning rate that left its own schedule."""

    row: int
    value: float
    usual: float

    @property
    def ratio(self) -> float:
        return self.value / self.usual if self.usual > 0 else np.inf


def lr_kink(window: Judged, first: int, last: int) -> Kink | None:
    """The first step from row `first` to `last` whose learning rate lies well above where it was
    heading.

    By where the last two steps point; or, of a rate that creeps away, by two points further back.
    """
    lr = window.tracks.outcome.get("lr", np.full(len(window.step_S), np.nan))
    for i in range(max(first, 2), min(last, len(lr) - 1) + 1):
        if lr[i] > KINK * _line(lr, i - 2, i - 1, i):
            return Kink(row=i, value=float(lr[i]), usual=_line(lr, i - 2, i - 1, i))
        if lr[i] > lr[i - 1] and lr[i] > KINK * _line(lr, i - 3 * _APART, i - 2 * _APART, i):
            row = _rose_from(lr, i)
            return Kink(row=row, value=float(lr[i]), usual=float(lr[row - 1]))
    return None


def _line(lr: np.ndarray, older: int, newer: int, row: int) -> float:
    """Where the rates of two rows point at another, for a rate that rises; NaN where that is not
    known.
    """
    if older < 0 or not (np.isfinite(lr[older]) and lr[newer] > 0):
        return float("nan")
    return float(lr[newer] + max(lr[newer] - lr[older], 0.0) * (row - newer) / (newer - older))


def _rose_from(lr: np.ndarray, i: int) -> int:
    """The first row of the climb that row `i` is in."""
    while i > 1 and lr[i - 1] < lr[i]:
        i -= 1
    return i + 1


def domain_of(
    run: Run, window: Judged, row: int, attempt: int | None, after: int = 5
) -> str | None:
    """The domain that the batches from row `row` on are suddenly full of; None where none is, or
    none were named.
    """
    if row >= len(window.step_S):
        return None
    at, last = int(window.step_S[row]), int(window.step_S[min(row + after, len(window.step_S) - 1)])
    if attempt is not None:
        run = run.as_of_attempt(attempt)
    rows = run.read_arrow("domains", ["step", "domain", "tokens"], (max(0, at - 64), last + 1))
    step, tokens = rows["step"].to_numpy(), rows["tokens"].to_numpy()
    names = np.array(rows["domain"].to_pylist(), object)
    now, before = step >= at, step < at
    if not now.any() or not before.any():
        return None

    def share(of: np.ndarray, name: str) -> float:
        return float(np.nansum(tokens[of & (names == name)]) / max(np.nansum(tokens[of]), 1.0))

    rise = {n: share(now, n) - share(before, n) for n in set(names[now])}
    most = max(rise, key=lambda n: rise[n])
    return str(most) if rise[most] > _FULL else None
