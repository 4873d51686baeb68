"""A sliding window kept sorted: its median and quantiles take microseconds, without numpy."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

_NORMAL_IQR = 1.349
"""Interquartile range of a normal distribution, in σ."""
_SMALL_SAMPLE = 8.0


def small_sample_factor(count: int) -> float:
    """Return 1 + 8 / `count`: the factor by which σ of few values is enlarged, to be cautious."""
    return 1 + _SMALL_SAMPLE / count


class SortedWindow:
    """The newest `size` values; `values` has the oldest first, `_sorted` the smallest first."""

    __slots__ = ("_sorted", "size", "values")

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.size = size
        self.values: deque[float] = deque(values, maxlen=size)
        self._sorted = sorted(self.values)

    def __len__(self) -> int:
        return len(self._sorted)

    def push(self, value: float) -> None:
        """Add a value; a full window drops its oldest."""
        if len(self._sorted) == self.size:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    def keep_oldest(self, count: int) -> None:
        """Remove the newest values until `count` are left."""
        while len(self.values) > count:
            del self._sorted[bisect_left(self._sorted, self.values.pop())]

    @property
    def median(self) -> float:
        """The upper median."""
        return self._sorted[len(self._sorted) // 2]

    @property
    def largest(self) -> float:
        return self._sorted[-1]

    @property
    def smallest(self) -> float:
        return self._sorted[0]

    @property
    def sigma(self) -> float:
        """Robust standard deviation; up to a quarter of the values may be arbitrary outliers."""
        # σ ≈ IQR / 1.349, exact for a normal distribution
        # (Huber and Ronchetti, Robust Statistics, 2nd ed., 2009).
        n = len(self._sorted)
        return (self._sorted[3 * n // 4] - self._sorted[n // 4]) / _NORMAL_IQR
