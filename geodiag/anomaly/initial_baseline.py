"""The first line of a baseline: level, slope and spread of the first few samples."""

from typing import NamedTuple

import numpy as np

_MAD_TO_SIGMA = 1.4826
"""σ over the median absolute deviation, for a normal distribution."""


class Line(NamedTuple):
    """A straight line through the first samples of each series."""

    level: np.ndarray
    """Its value at the last sample."""
    slope: np.ndarray
    """Half of the fitted slope per sample: few samples overestimate it."""
    spread: np.ndarray


def fit_line(rows: np.ndarray) -> Line:
    """Fit a robust line to each column of `rows` (samples × series)."""
    # Idea: a line through the medians of the older and the newer half of the samples
    # (as Tukey's resistant line; Exploratory Data Analysis, 1977).
    # slope = (median(newer) − median(older)) / distance of the centres of the halves
    first = len(rows)
    half = first // 2
    older = np.median(rows[:half], 0)
    newer = np.median(rows[-half:], 0)
    slope = (newer - older) / (first - half)

    # spread = max(1.4826 · median |residual|, 0.4 · max |residual|)
    centre = first - half + (half - 1) / 2
    offsets = np.arange(first)[:, None] - centre
    residual = np.abs(rows - newer - slope * offsets)
    spread = np.maximum(_MAD_TO_SIGMA * np.median(residual, 0), 0.4 * residual.max(0))
    return Line(newer + slope * (half - 1) / 2, slope / 2, spread)
