"""Stage scores: how far each layer stands from its own past, in robust standard deviations."""

from collections.abc import Mapping

import numpy as np

from geodiag.schema import METRICS

_MAD = 1.4826  # turns a median absolute deviation into the σ of a normal distribution
_CEILING = 1e3


class StageScores:
    """A rolling median and MAD for every metric and layer; the worst z of each stage.

    Positive metrics are compared in logarithms, so that a trend of the same rate looks the same at every size. What
    is abnormal does not enter the window; where it lasts longer than the window, it is the new normal.
    """

    def __init__(self, window: int = 64, warmup: int = 24, abnormal: float = 8.0) -> None:
        self.window, self.warmup, self.abnormal = window, warmup, abnormal
        self._past: dict[str, np.ndarray] = {}
        self._count: dict[str, int] = {}
        self._rejected: dict[str, np.ndarray] = {}

    def update(self, values: Mapping[str, np.ndarray]) -> dict[int, float]:
        """One step's values by metric (an array over layers) → score of each stage; NaN while warming up."""
        scores = {1: np.nan, 2: np.nan, 3: np.nan}
        for name, value in values.items():
            metric = METRICS.get(("layers", name))
            if metric is None or metric.stage is None:
                continue
            z = self._z(name, np.asarray(value, np.float64))
            if z.size and not np.isnan(z).all():
                scores[metric.stage] = np.nanmax([scores[metric.stage], np.nanmax(z)])
        return scores

    def _z(self, name: str, value: np.ndarray) -> np.ndarray:
        broken = ~np.isfinite(value) & ~np.isnan(value)
        if METRICS["layers", name].unit in ("×", "1"):
            value = np.log(np.maximum(np.where(broken, np.nan, value), 1e-12))
        if name not in self._past:
            self._past[name] = np.full((self.window, len(value)), np.nan)
            self._count[name] = 0
            self._rejected[name] = np.zeros(len(value), int)
        past, count = self._past[name], self._count[name]
        if count < self.warmup:
            past[count % self.window] = value
            self._count[name] += 1
            return np.full(len(value), np.nan)
        window = past[: min(count, self.window)]
        with np.errstate(all="ignore"):
            median = _median(window)
            mad = _median(np.abs(window - median))
            # A metric that hardly moves (a gain of exactly 1) must not make noise of its last digit.
            z = (value - median) / (_MAD * mad + 0.01 * np.maximum(np.abs(median), 0.1) + 1e-9)
        z = np.where(broken, _CEILING, np.minimum(z, _CEILING))
        odd = (np.abs(z) > self.abnormal) & (self._rejected[name] < self.window)
        self._rejected[name] = np.where(odd, self._rejected[name] + 1, 0)
        past[count % self.window] = np.where(odd, past[(count - 1) % self.window], value)
        self._count[name] += 1
        return z


def _median(rows: np.ndarray) -> np.ndarray:
    """Median down the rows; NaN columns stay NaN without a warning."""
    ordered = np.sort(rows, axis=0)
    return ordered[len(rows) // 2]
