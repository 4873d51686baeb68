"""A running baseline for many series at once: what each should be now, and how far from that is far.

One pass an update and constant memory, so that the same code judges a training while it runs and a window of a
recorded one. Every series has a level and a slope that follow it (Holt), a spread, and the height of its own odd
moments. All four learn from clipped surprises only: what is out of range moves the baseline little, what is far out
of range not at all, and what stays there for `patience` samples is the new normal.
"""

import numpy as np

CEILING = 1e3
"""The largest score; what is not finite has it."""
_MEAN_TO_SIGMA = 1.29  # σ over the mean of |x| clipped at 3 σ, for normal noise, with a margin for its own error
_CLIP = 3.0
_STALE = 0.2  # how much a σ grows for each usual gap that a value is overdue
_ODD = 6.0
"""σ from which a value is not learned at all."""


class Baseline:
    """Robust z of every series against its own past; `update` takes one sample of each, NaN where there is none."""

    def __init__(
        self,
        floor: np.ndarray,
        *,
        first: int = 12,
        level: float = 0.08,
        slope: float = 0.003,
        spread: float = 0.03,
        patience: int = 64,
        forget: float = 0.004,
    ) -> None:
        """
        floor: least σ of each series.
        first: samples from which the baseline begins; until then z is NaN.
        level, slope, spread: how fast these follow.
        patience: samples out of range that make a new normal.
        forget: how fast the height of odd moments fades.
        """
        n = len(floor)
        self.floor, self.first, self.patience = floor, first, patience
        self._rates = level, slope, spread, forget
        self.level, self.slope = np.zeros(n), np.zeros(n)
        self.spread, self.odd = np.zeros(n), np.ones(n)
        self._count = np.zeros(n, int)
        self._out = np.zeros(n, int)
        self._pending = np.zeros(n)
        self._early = np.full((first, n), np.nan)
        self._gap, self._usual_gap = np.ones(n), np.ones(n)

    def extend(self, floor: np.ndarray) -> None:
        """More series from here on, each with a past of its own still to come."""
        new = Baseline(floor, first=self.first)
        for name in ("floor", "level", "slope", "spread", "odd", "_count", "_out", "_pending", "_gap", "_usual_gap"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(new, name)]))
        self._early = np.concatenate([self._early, new._early], 1)

    def update(self, x: np.ndarray) -> np.ndarray:
        """Signed z of each series: 0 is as expected. NaN where nothing was sampled or too little is known."""
        known = np.isfinite(x)
        ready = self._count >= self.first
        expected = self.level + self.slope
        surprise = np.where(known, x - expected, 0.0)
        sigma = np.maximum(self.spread * (1 + 4 / np.maximum(self._count, 1)), self.floor)
        # What was not seen for longer than usual (an expert without tokens) may have moved meanwhile.
        sigma *= 1 + _STALE * np.maximum(self._gap / self._usual_gap - 1, 0)
        self._usual_gap += np.where(known, 0.1 * (np.minimum(self._gap, 2 * self._usual_gap) - self._usual_gap), 0)
        self._gap = np.where(known, 1, self._gap + 1)
        z = surprise / sigma
        score = np.where(known & ready, z / self.odd, np.nan)
        self._learn(known & ready, x, expected, surprise, z)
        if not ready.all():
            self._begin(known & ~ready, x)
        self._count += known
        wild = np.isinf(x) & ready
        score[wild] = np.where(x[wild] > 0, CEILING, -CEILING)
        return np.clip(score, -CEILING, CEILING)

    def _learn(self, now: np.ndarray, x: np.ndarray, expected: np.ndarray, surprise: np.ndarray, z: np.ndarray) -> None:
        age, forget = np.maximum(self._count, 1), self._rates[3]
        level, slope, spread = (
            np.maximum(rate, young) for rate, young in zip(self._rates[:3], (2 / age, 4 / age**2, 1 / age), strict=True)
        )
        size = np.abs(z)
        odd = size > _ODD * self.odd
        normal = now & ~odd
        clipped = np.clip(z, -_CLIP, _CLIP) * np.maximum(self.spread, self.floor)
        self.level = np.where(normal, expected + level * clipped, np.where(now, expected, self.level))
        self.slope = np.where(normal, self.slope + slope * clipped, np.where(now, 0.98 * self.slope, self.slope))
        target = _MEAN_TO_SIGMA * np.minimum(np.abs(surprise), _CLIP * np.maximum(self.spread, self.floor))
        self.spread = np.where(normal, self.spread + spread * (target - self.spread), self.spread)
        # The height of an odd moment counts once it is over: a fault that stays must not excuse itself.
        outside = now & (size > _CLIP)
        self._pending = np.where(outside, np.maximum(self._pending, size), self._pending)
        self._out = np.where(outside, self._out + 1, self._out)
        over = now & ~outside
        brief = over & (self._out > 0) & (self._out <= 3)
        height = np.minimum(self._pending / _CLIP, 10.0)
        self.odd = np.where(brief, np.maximum(self.odd, height), self.odd - forget * (self.odd - 1) * now)
        self._pending = np.where(over, 0.0, self._pending)
        self._out = np.where(over, 0, self._out)
        stayed = now & (self._out >= np.clip(self._count // 4, 3, self.patience))
        if stayed.any():
            self.level = np.where(stayed, x, self.level)
            self.slope = np.where(stayed, 0.0, self.slope)
            self.spread = np.where(
                stayed, np.maximum(2 * self.spread, np.minimum(np.abs(surprise) / 4, 8 * self.spread)), self.spread
            )
            self._out[stayed], self._pending[stayed] = 0, 0.0

    def _begin(self, now: np.ndarray, x: np.ndarray) -> None:
        """The first samples are kept; with the last of them a series has its line and its spread."""
        columns = np.flatnonzero(now)
        if not len(columns):
            return
        self._early[self._count[columns], columns] = x[columns]
        full = columns[self._count[columns] == self.first - 1]
        if not len(full):
            return
        rows, half = self._early[:, full], self.first // 2
        older, newer = np.median(rows[:half], 0), np.median(rows[-half:], 0)
        slope = (newer - older) / (self.first - half)
        at = np.arange(self.first)[:, None] - (self.first - half + (half - 1) / 2)
        residual = np.abs(rows - newer - slope * at)
        self.level[full] = newer + slope * (half - 1) / 2
        self.slope[full] = slope / 2
        self.spread[full] = np.maximum(1.4826 * np.median(residual, 0), 0.4 * residual.max(0))
