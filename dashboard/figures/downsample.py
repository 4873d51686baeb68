"""Downsampling of series that keeps every extreme and every gap."""

from typing import NamedTuple

import numpy as np
from tsdownsample import MinMaxDownsampler, MinMaxLTTBDownsampler

_SHAPE, _EXTREMES = 1200, 1200
"""Points chosen by shape (LTTB), and points chosen as minimum and maximum of each pixel."""


class Points(NamedTuple):
    """The points of a line; NaN in y breaks it."""

    x: np.ndarray
    y: np.ndarray


def downsampled(step_S: np.ndarray, value_S: np.ndarray) -> Points:
    """Return at most a few thousand points of a series; NaN breaks the line.

    LTTB alone may drop one of two opposite spikes in the same bucket, and its variants for NaN may
    drop a spike beside a gap. Therefore the finite values are downsampled, by shape and by
    extremes, and the gaps are inserted again. ±inf is left out, see `nonfinite_steps`.
    """
    kept = np.flatnonzero(np.isfinite(value_S))
    if not len(kept):
        return Points(np.array([]), np.array([]))
    x, y = step_S[kept], value_S[kept].astype(np.float32)
    # A gap is a distance between samples of more than 1.5 times the usual one.
    cadence = np.median(np.diff(x)) if len(x) > 1 else 1
    gap_after = np.flatnonzero(np.diff(x) > 1.5 * cadence)
    if len(x) > _SHAPE + _EXTREMES:
        shape = MinMaxLTTBDownsampler().downsample(x.astype(np.float64), y, n_out=_SHAPE)
        extremes = MinMaxDownsampler().downsample(x.astype(np.float64), y, n_out=_EXTREMES)
        edges = _evenly(np.union1d(gap_after, gap_after + 1))
        indices = np.unique(np.concatenate([shape, extremes, edges]).astype(np.int64))
        gap_after = np.flatnonzero(np.isin(indices, gap_after))
        x, y = x[indices], y[indices]
    hole = gap_after + 1
    return Points(
        np.insert(x.astype(float), hole, (x[hole - 1] + x[hole]) / 2), np.insert(y, hole, np.nan)
    )


def nonfinite_steps(step_S: np.ndarray, value_S: np.ndarray, most: int = 400) -> np.ndarray:
    """Return the steps with a measured value that is not finite, evenly spaced if too many."""
    return _evenly(step_S[np.isinf(value_S)], most)


def _evenly(items: np.ndarray, most: int = 1200) -> np.ndarray:
    return items if len(items) <= most else items[np.linspace(0, len(items) - 1, most).astype(int)]
