"""A running baseline for many series at once: what each should be now, and how far from that is
far.

One pass an update and constant memory, so that the same code judges a training while it runs and a
window of a recorded one. Every series has a level and a slope that follow it (Holt), a spread, and
the height of its own odd moments. All four learn from clipped surprises only: what is out of range
moves the baseline little, what is far out of range not at all, and what stays there for `patience`
samples is the new normal.
"""

import numpy as np

CEILING = 1e3
"""The largest score; what is not finite has it."""
_MEAN_TO_SIGMA = (
    1.29  # σ over the mean of |x| clipped at 3 σ, for normal noise, with a margin for its own error
)
_CLIP = 3.0
_YOUNG = 160
"""Samples up to which a baseline follows faster than later."""
_LONG_GONE = 5
"""Usual gaps after which a series that comes back is young again."""
_SETTLED = 128
_FLATTENS = 0.95
_STALE = 0.2  # how much a σ grows for each usual gap that a value is overdue
_ODD = 6.0
"""σ from which a value is not learned at all."""


_LEARNED = ("floor", "level", "slope", "spread", "odd")
_COUNTED = ("_count", "_out", "_pending", "_lean", "_gap", "_usual_gap")


class Baseline:
    """Robust z of every series against its own past; `update` takes one sample of each, NaN where
    there is none.
    """

    def __init__(
        self,
        floor: np.ndarray,
        *,
        first: int = 12,
        level: float = 0.05,
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
        self.learning = True
        """Off, what was learned so far is what all that comes is held against; slopes run out."""
        self._rates = level, slope, spread, forget
        self.level, self.slope = np.zeros(n), np.zeros(n)
        self.spread, self.odd = np.zeros(n), np.ones(n)
        self._count = np.zeros(n, int)
        self._out = np.zeros(n, int)
        self._pending, self._lean = np.zeros(n), np.zeros(n)
        self._early = np.full((first, n), np.nan)
        self._gap, self._usual_gap = np.ones(n), np.ones(n)

    def extend(self, floor: np.ndarray) -> None:
        """More series from here on, each with a past of its own still to come."""
        new = Baseline(floor, first=self.first)
        for name in _LEARNED + _COUNTED:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(new, name)]))
        self._early = np.concatenate([self._early, new._early], 1)

    def update(self, x: np.ndarray) -> np.ndarray:
        """Signed z of each series: 0 is as expected. NaN where nothing was sampled or too little is
        known.
        """
        known = np.isfinite(x)
        ready = self._count >= self.first
        now = known & ready
        surprise = np.where(now, x - self.level - self.slope, 0.0)
        base = np.maximum(self.spread, self.floor)
        z = surprise / (base * self._doubt())
        score = np.where(now, z / self.odd, np.nan)
        if self.learning:
            self._learn(now, x, surprise, z, base)
        else:
            self.slope *= _FLATTENS
            self.level += self.slope
        if not ready.all():
            self._begin(known & ~ready, x)
        self._count += known
        self._seen(known)
        wild = np.isinf(x) & ready
        if wild.any():
            score[wild] = np.where(x[wild] > 0, CEILING, -CEILING)
        return np.minimum(np.maximum(score, -CEILING), CEILING)

    def _doubt(self) -> np.ndarray:
        """Factor on σ: little was seen so far, or not for long (an expert without tokens may have
        moved meanwhile).
        """
        return (1 + 4 / np.maximum(self._count, 1)) * (
            1 + _STALE * np.maximum(self._gap / self._usual_gap - 1, 0)
        )

    def _seen(self, known: np.ndarray) -> None:
        late = np.minimum(self._gap, 2 * self._usual_gap) - self._usual_gap
        back = known & (self._gap > _LONG_GONE * self._usual_gap) & (self._count > self.first)
        if back.any():
            self._count[back] = self.first
        self._usual_gap += 0.1 * late * known
        self._gap += 1
        self._gap[known] = 1

    def _learn(
        self, now: np.ndarray, x: np.ndarray, surprise: np.ndarray, z: np.ndarray, base: np.ndarray
    ) -> None:
        """Levels, slopes and spreads follow what is in range; what is out of range is counted."""
        rates: tuple = self._rates
        if (age := self._count.min(initial=0)) < _YOUNG:
            age = np.maximum(self._count, 1)
            rates = tuple(map(np.maximum, rates, (8 / age, 4 / age**2, 3 / age, 2 / age)))
        size = np.abs(z)
        normal = now & (size <= _ODD * self.odd)
        most = _CLIP * base
        clipped = np.minimum(np.maximum(surprise, -most), most) * normal
        self.level += self.slope * now + rates[0] * clipped
        self.slope += rates[1] * clipped - 0.02 * self.slope * (now & ~normal)
        # Once a training is settled, a drift is not noise: surprises that all point one way widen
        # the spread little.
        self._lean += 0.2 * (np.minimum(np.maximum(z / _CLIP, -1), 1) - self._lean) * now
        settled = np.minimum(np.maximum(self._count / _SETTLED - 0.5, 0), 1)
        steady = normal * (1 - settled * np.minimum(1.5 * np.abs(self._lean), 1))
        self.spread += rates[2] * (_MEAN_TO_SIGMA * np.abs(clipped) - self.spread) * steady
        self.odd -= rates[3] * (self.odd - 1) * now
        outside = size > _CLIP
        few = np.flatnonzero(now & (outside | (self._out > 0)))
        if len(few):
            self._out_of_range(few, outside[few], size[few])
            self._settle(few, x[few], surprise[few])

    def _out_of_range(self, few: np.ndarray, outside: np.ndarray, size: np.ndarray) -> None:
        """The height of an odd moment counts once it is over: a fault that stays must not excuse
        itself.
        """
        brief = ~outside & (self._out[few] <= 3)
        height = np.minimum(self._pending[few] / _CLIP, 10.0)
        self.odd[few] = np.where(brief, np.maximum(self.odd[few], height), self.odd[few])
        self._pending[few] = np.maximum(self._pending[few], size) * outside
        self._out[few] = (self._out[few] + 1) * outside

    def _settle(self, few: np.ndarray, x: np.ndarray, surprise: np.ndarray) -> None:
        """What stayed out of range long enough, for its age, is the new normal."""
        age = self._count[few] - self._out[few]  # when it left its range: the younger, the sooner
        stayed = self._out[few] >= np.clip(age**2 // 160, 3, self.patience)
        if stayed.any():
            mine, was = few[stayed], self.spread[few[stayed]]
            self.level[mine], self.slope[mine] = x[stayed], 0.0
            self.spread[mine] = np.maximum(
                2 * was, np.minimum(np.abs(surprise[stayed]) / 4, 8 * was)
            )
            self._out[mine], self._pending[mine] = 0, 0.0

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
