"""A sliding window that is always sorted: medians and quantiles in microseconds, with no array
library.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

_NORMAL_IQR = 1.349
"""Interquartile range of a normal distribution, in σ."""


class SortedWindow:
    """The newest `size` values, oldest first in `values` and smallest first in `_sorted`."""

    __slots__ = ("_sorted", "size", "values")

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.size = size
        self.values: deque[float] = deque(values, maxlen=size)
        self._sorted = sorted(self.values)

    def __len__(self) -> int:
        return len(self._sorted)

    def push(self, value: float) -> None:
        if len(self._sorted) == self.size:
            del self._sorted[bisect_left(self._sorted, self.values[0])]
        self.values.append(value)
        insort(self._sorted, value)

    def keep_oldest(self, count: int) -> None:
        """Forgets the newest values until `count` are left."""
        while len(self.values) > count:
            del self._sorted[bisect_left(self._sorted, self.values.pop())]

    @property
    def median(self) -> float:
        return self._sorted[len(self._sorted) // 2]

    @property
    def largest(self) -> float:
        return self._sorted[-1]

    @property
    def smallest(self) -> float:
        return self._sorted[0]

    @property
    def sigma(self) -> float:
        """Robust standard deviation: one value in four may be anything."""
        n = len(self._sorted)
        return (self._sorted[3 * n // 4] - self._sorted[n // 4]) / _NORMAL_IQR
