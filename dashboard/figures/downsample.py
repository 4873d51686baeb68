"""Fewer points, the same picture: no extreme is lost, and what was not measured stays a gap."""

from typing import NamedTuple

import numpy as np
from tsdownsample import MinMaxDownsampler, MinMaxLTTBDownsampler

_SHAPE, _EXTREMES = 1200, 1200
"""Points that keep the shape of the line, and points that are each pixel's smallest and largest
value.
"""


class Points(NamedTuple):
    """A line to draw: NaN in y breaks it."""

    x: np.ndarray
    y: np.ndarray


def downsampled(step_S: np.ndarray, value_S: np.ndarray) -> Points:
    """At most a few thousand points of a series: NaN is "no value" and breaks the line, ±inf is
    left to `broken`.

    LTTB alone may drop one of two opposite spikes that share a bucket, and the NaN-aware variants
    keep the NaN and drop the spike beside it; so the finite values are thinned, by shape and by
    extremes, and the gaps put back.
    """
    kept = np.flatnonzero(np.isfinite(value_S))
    if not len(kept):
        return Points(np.array([]), np.array([]))
    x, y = step_S[kept], value_S[kept].astype(np.float32)
    # A gap is where more steps are missing than the series' own cadence explains.
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
    """Steps at which the value was measured and was not finite; evenly fewer where there are very
    many.
    """
    return _evenly(step_S[np.isinf(value_S)], most)


def _evenly(items: np.ndarray, most: int = 1200) -> np.ndarray:
    return items if len(items) <= most else items[np.linspace(0, len(items) - 1, most).astype(int)]
