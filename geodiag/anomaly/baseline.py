"""Running baselines of many series at once: the expected value of each, and its normal spread.

One pass per update and constant memory, so that the same code scores a run during the training and
a window of a recorded run.

Each series has a level and a slope (Holt's linear method), a spread, and an outlier scale. All four
learn from clipped residuals only: a value out of range moves the baseline little, a value far out
of range not at all, and a level that lasts for `patience` samples is accepted as normal.
"""

import numpy as np

from geodiag.anomaly.initial_baseline import fit_line

MAX_SCORE = 1e3
"""The largest score; a value that is not finite has it."""
_MEAN_TO_SIGMA = 1.29
"""σ over the mean of |x| clipped at 3 σ, for normal noise, with a margin for its own error."""
_CLIP = 3.0
"""σ at which a residual is clipped."""
_NOT_LEARNED = 6.0
"""σ from which a value is not learned at all."""
_YOUNG = 160
"""Samples up to which a baseline learns faster than later."""
_SETTLED = 128
"""Samples after which a baseline is settled: a steady drift then hardly widens the spread."""
_LONG_GAP = 5
"""Usual gaps after which a series that returns counts as young again."""
_STALE = 0.2
"""Growth of σ for each usual gap that a value is overdue."""
_SLOPE_DECAY = 0.95
"""Decay of the slope per sample while learning is off."""

_LEARNED = ("floor", "level", "slope", "spread", "outlier_scale")
_COUNTED = ("_count", "_outside", "_pending_height", "_bias", "_gap", "_usual_gap")


class Baseline:
    """Robust z-score of every series against its own past.

    `update` takes one sample of each series, NaN for a series without a sample.
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
        first: samples before the baseline begins; z is NaN until then.
        level, slope, spread: learning rates of these.
        patience: samples out of range after which their level is accepted as normal.
        forget: rate at which the outlier scale decays to 1.
        """
        n = len(floor)
        self.first = first
        self.patience = patience
        self.learning = True
        """False to keep the level and the spread as learned so far; slopes then decay to 0."""
        self._rates = (level, slope, spread, forget)

        self.floor = floor
        self.level = np.zeros(n)
        self.slope = np.zeros(n)
        self.spread = np.zeros(n)
        self.outlier_scale = np.ones(n)
        """Height of recent short outliers, in units of the clip: scores are divided by it."""

        self._count = np.zeros(n, int)
        self._outside = np.zeros(n, int)  # consecutive samples out of range
        self._pending_height = np.zeros(n)  # height of the outlier that is not over yet
        self._bias = np.zeros(n)  # running mean of the residuals, clipped to −1 … 1
        self._gap = np.ones(n)  # updates since the last sample
        self._usual_gap = np.ones(n)
        self._first_samples = np.full((first, n), np.nan)

    def extend(self, floor: np.ndarray) -> None:
        """Add series, each without a past."""
        new = Baseline(floor, first=self.first)
        for name in _LEARNED + _COUNTED:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(new, name)]))
        self._first_samples = np.concatenate([self._first_samples, new._first_samples], 1)

    def update(self, x: np.ndarray) -> np.ndarray:
        """Return the signed z of each series; 0 is as expected.

        z is NaN for a series without a sample, or with too few so far.
        """
        known = np.isfinite(x)
        ready = self._count >= self.first
        now = known & ready

        # Idea: Holt's linear method predicts the next value as level + slope; the residual in
        # robust σ is the score (Holt 1957; Hyndman and Athanasopoulos, Forecasting, section 8.2).
        # z = (x − level − slope) / (max(spread, floor) · uncertainty)
        residual = np.where(now, x - self.level - self.slope, 0.0)
        base = np.maximum(self.spread, self.floor)
        z = residual / (base * self._uncertainty())
        score = np.where(now, z / self.outlier_scale, np.nan)

        if self.learning:
            self._learn(now, x, residual, z, base)
        else:
            self.slope *= _SLOPE_DECAY
            self.level += self.slope
        if not ready.all():
            self._begin(known & ~ready, x)
        self._count += known
        self._update_gaps(known)

        infinite = np.isinf(x) & ready
        if infinite.any():
            score[infinite] = np.where(x[infinite] > 0, MAX_SCORE, -MAX_SCORE)
        return np.minimum(np.maximum(score, -MAX_SCORE), MAX_SCORE)

    def _uncertainty(self) -> np.ndarray:
        """Return the factor on σ of a baseline with few samples, or without a recent one."""
        # For example, an expert without tokens may have changed since its last sample.
        # factor = (1 + 4 / n) · (1 + 0.2 · usual gaps overdue)
        few = 1 + 4 / np.maximum(self._count, 1)
        overdue = np.maximum(self._gap / self._usual_gap - 1, 0)
        return few * (1 + _STALE * overdue)

    def _update_gaps(self, known: np.ndarray) -> None:
        """Track the usual gap between samples; a series after a long gap counts as young."""
        late = np.minimum(self._gap, 2 * self._usual_gap) - self._usual_gap
        returned = known & (self._gap > _LONG_GAP * self._usual_gap) & (self._count > self.first)
        if returned.any():
            self._count[returned] = self.first
        self._usual_gap += 0.1 * late * known
        self._gap += 1
        self._gap[known] = 1

    def _learning_rates(self) -> tuple[np.ndarray | float, ...]:
        """Return the rates of level, slope, spread and outlier scale, larger for young series."""
        if self._count.min(initial=0) >= _YOUNG:
            return self._rates
        age = np.maximum(self._count, 1)
        young = (8 / age, 4 / age**2, 3 / age, 2 / age)
        return tuple(np.maximum(rate, r) for rate, r in zip(self._rates, young, strict=True))

    def _learn(
        self, now: np.ndarray, x: np.ndarray, residual: np.ndarray, z: np.ndarray, base: np.ndarray
    ) -> None:
        """Update level, slope, spread and outlier scale from the values that are in range."""
        level_rate, slope_rate, spread_rate, forget_rate = self._learning_rates()
        size = np.abs(z)
        normal = now & (size <= _NOT_LEARNED * self.outlier_scale)

        # Idea: Holt's method on clipped residuals, so that an outlier has bounded influence
        # (robust Holt smoothing; Gelper, Fried and Croux 2010, J. Forecasting 29).
        # level += slope + α e, slope += β e, with e = clip(residual, ±3 σ)
        most = _CLIP * base
        clipped = np.minimum(np.maximum(residual, -most), most) * normal
        self.level += self.slope * now + level_rate * clipped
        self.slope += slope_rate * clipped - 0.02 * self.slope * (now & ~normal)

        # Residuals that all have one sign are drift, not noise: in a settled baseline they widen
        # the spread little. spread += γ (1.29 |e| − spread) · (1 − 1.5 |bias|)
        self._bias += 0.2 * (np.minimum(np.maximum(z / _CLIP, -1), 1) - self._bias) * now
        settled = np.minimum(np.maximum(self._count / _SETTLED - 0.5, 0), 1)
        steady = normal * (1 - settled * np.minimum(1.5 * np.abs(self._bias), 1))
        self.spread += spread_rate * (_MEAN_TO_SIGMA * np.abs(clipped) - self.spread) * steady
        self.outlier_scale -= forget_rate * (self.outlier_scale - 1) * now

        outside = size > _CLIP
        few = np.flatnonzero(now & (outside | (self._outside > 0)))
        if len(few):
            self._count_outside(few, outside[few], size[few])
            self._accept_levels(few, x[few], residual[few])

    def _count_outside(self, few: np.ndarray, outside: np.ndarray, size: np.ndarray) -> None:
        """Count samples out of range, and raise the outlier scale after a short outlier.

        The outlier counts only once it is over, so that a lasting fault does not lower its own
        score.
        """
        over = ~outside & (self._outside[few] <= 3)
        height = np.minimum(self._pending_height[few] / _CLIP, 10.0)
        scale = self.outlier_scale[few]
        self.outlier_scale[few] = np.where(over, np.maximum(scale, height), scale)
        self._pending_height[few] = np.maximum(self._pending_height[few], size) * outside
        self._outside[few] = (self._outside[few] + 1) * outside

    def _accept_levels(self, few: np.ndarray, x: np.ndarray, residual: np.ndarray) -> None:
        """Accept a level that lasted long enough as normal; a young series needs fewer samples."""
        age = self._count[few] - self._outside[few]  # samples before the series left its range
        stayed = self._outside[few] >= np.clip(age**2 // 160, 3, self.patience)
        if not stayed.any():
            return
        accepted = few[stayed]
        spread = self.spread[accepted]
        self.level[accepted] = x[stayed]
        self.slope[accepted] = 0.0
        self.spread[accepted] = np.maximum(
            2 * spread, np.minimum(np.abs(residual[stayed]) / 4, 8 * spread)
        )
        self._outside[accepted] = 0
        self._pending_height[accepted] = 0.0

    def _begin(self, now: np.ndarray, x: np.ndarray) -> None:
        """Store the first samples; the last of them gives a series its line and its spread."""
        columns = np.flatnonzero(now)
        if not len(columns):
            return
        self._first_samples[self._count[columns], columns] = x[columns]
        full = columns[self._count[columns] == self.first - 1]
        if len(full):
            line = fit_line(self._first_samples[:, full])
            self.level[full] = line.level
            self.slope[full] = line.slope
            self.spread[full] = line.spread
