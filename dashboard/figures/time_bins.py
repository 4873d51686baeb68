"""Columns of a heat map: one per sampled step, or the worst value of several steps."""

from typing import NamedTuple

import numpy as np

from geodiag.dashboard.data.grid import Grid

COLUMNS = 1200
"""Most columns of a heat map, about as many as pixels on a screen."""


class Binned(NamedTuple):
    """A grid in columns of equal width. Column i: steps left[i] ≤ step < left[i] + width."""

    left_B: np.ndarray
    width: int
    values_RB: np.ndarray
    merged: bool
    """True if a column holds more than one sample."""


def binned(grid: Grid, columns: int = COLUMNS) -> Binned:
    """Return the worst value of each column (see `_worst`), NaN only where all are NaN."""
    sampled = np.flatnonzero(~np.isnan(grid.values_RS).all(0))
    steps, values_RS = grid.steps_S[sampled].astype(np.int64), grid.values_RS[:, sampled]
    if not len(steps):
        return Binned(np.array([], int), 1, values_RS, False)
    cadence = max(1, int(np.median(np.diff(steps)))) if len(steps) > 1 else 1
    span = int(steps[-1] - steps[0]) + 1
    width = cadence * max(1, -(-span // (cadence * columns)))
    bin_S = (steps - steps[0]) // width
    count = int(bin_S[-1]) + 1
    out_RB = np.full((len(values_RS), count), np.nan, np.float32)
    starts = np.flatnonzero(np.diff(bin_S, prepend=-1))
    out_RB[:, bin_S[starts]] = _worst(values_RS, starts, grid.metric.worse)
    return Binned(steps[0] + width * np.arange(count), width, out_RB, len(starts) < len(steps))


def _worst(values_RS: np.ndarray, starts: np.ndarray, worse: str | None) -> np.ndarray:
    """Return the worst value of each group of columns.

    If neither high nor low is bad: the value furthest from the median of the row.
    """
    if worse == "low":
        return np.fmin.reduceat(values_RS, starts, axis=1)
    high_RB = np.fmax.reduceat(values_RS, starts, axis=1)
    if worse == "high" or len(starts) == values_RS.shape[1]:
        return high_RB
    low_RB = np.fmin.reduceat(values_RS, starts, axis=1)
    usual_R1 = np.nanmedian(values_RS, axis=1, keepdims=True)
    return np.where(high_RB - usual_R1 >= usual_R1 - low_RB, high_RB, low_RB)


def worst_step(grid: Grid, row: int, left: int, width: int) -> int | None:
    """Return the step of the worst value of `row` in one column, e.g. a clicked one."""
    column = grid.window(left, left + width - 1)
    values = column.values_RS[row]
    if np.isnan(values).all():
        return None
    pick = np.nanargmin if grid.metric.worse == "low" else np.nanargmax
    return int(column.steps_S[pick(values)])
