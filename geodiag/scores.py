"""Stage scores: how far each layer stands from its own past, in robust standard deviations."""

from collections.abc import Mapping

import numpy as np

from geodiag.schema import METRICS

_MAD = 1.4826  # turns a median absolute deviation into the σ of a normal distribution
_CEILING = 1e3


class StageScores:
    """A rolling trend and MAD for every metric and layer; the worst z of each stage.

    Positive metrics are compared in logarithms, so that a trend of the same rate looks the same at every size. The
    trend is a line through the medians of the window's two halves: warm-up and the steep early descent are no news.
    What is abnormal does not enter the window; where it lasts longer than the window, it is the new normal.
    """

    def __init__(self, window: int = 64, abnormal: float = 8.0) -> None:
        self.window, self.abnormal = window, abnormal
        self._steps = 0
        self._group_of: dict[str, _Key] = {}
        self._groups: dict[_Key, _Group] = {}

    def update(self, values: Mapping[str, np.ndarray]) -> dict[int, float]:
        """One step's values by metric (an array over layers) → score of each stage; NaN while warming up."""
        together: dict[_Key, dict[str, np.ndarray]] = {}
        for name, value in values.items():
            metric = METRICS.get(("layers", name))
            if metric is not None and metric.stage is not None:
                key = self._group_of.setdefault(name, (self._steps, metric.every))
                together.setdefault(key, {})[name] = np.asarray(value, np.float64)
        self._steps += 1
        scores = {1: np.nan, 2: np.nan, 3: np.nan}
        for key, members in together.items():
            if key not in self._groups:
                self._groups[key] = _Group(members, self.window, self.abnormal)
            for stage, z in self._groups[key].update(members).items():
                scores[stage] = np.fmax(scores[stage], z)
        return scores


_Key = tuple[int, int]
"""Metrics that were first seen together and share a cadence are judged together, in one pass over one array."""


class _Group:
    """The window of several metrics side by side."""

    def __init__(self, members: Mapping[str, np.ndarray], window: int, abnormal: float) -> None:
        self.abnormal, self._count = abnormal, 0
        metrics = [METRICS["layers", n] for n in members]
        widths = [len(v) for v in members.values()]
        self.names = list(members)
        self._log = np.repeat([m.unit in ("×", "1") for m in metrics], widths)
        self._stage = np.repeat([m.stage for m in metrics], widths)
        self._past = np.full((window, sum(widths)), np.nan)
        self._seen = self._past.copy()  # the same window with nothing kept out
        self._rejected = np.zeros(sum(widths), int)

    def update(self, members: Mapping[str, np.ndarray]) -> dict[int, float]:
        """The largest z of each stage; nothing while the window fills, or where a metric is missing."""
        if any(n not in members for n in self.names):
            return {}
        value = np.concatenate([members[n] for n in self.names])
        broken = np.isinf(value)
        value[self._log] = np.log(np.maximum(np.where(broken, np.nan, value), 1e-12))[self._log]
        self._seen[:-1] = self._seen[1:]
        self._seen[-1] = value
        if self._count < len(self._past):
            self._past[self._count] = value
            self._count += 1
            return {}
        expected, spread = _trend(self._past)
        # A metric that hardly moves (a gain of exactly 1) must not make noise of its last digit.
        z = (value - expected) / (_MAD * spread + 0.02 * np.maximum(np.abs(expected), 0.1) + 1e-9)
        z = np.where(broken, _CEILING, np.minimum(z, _CEILING))
        odd = np.abs(z) > self.abnormal
        self._past[:-1] = self._past[1:]
        self._past[-1] = np.where(odd, expected, value)
        self._rejected += np.where(odd, 1, -self._rejected)
        lasting = self._rejected >= len(self._past)
        self._past[:, lasting] = self._seen[:, lasting]
        self._rejected[lasting] = 0
        known = ~np.isnan(z)
        return {int(s): float(z[known & (self._stage == s)].max()) for s in np.unique(self._stage[known])}


def _trend(past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the line through the halves' medians puts the next row, and the median distance of the rows from it."""
    half = len(past) // 2
    older, newer = _median(past[:half]), _median(past[half:])
    slope = (newer - older) / half
    at = np.arange(len(past))[:, None] - (half + (half - 1) / 2)
    spread = _median(np.abs(past - (newer + slope * at)))
    return newer + slope * (half + 1) / 2, spread


def _median(rows: np.ndarray) -> np.ndarray:
    """Median down the rows; a NaN sorts last and so counts as large."""
    return np.sort(rows, axis=0)[len(rows) // 2]
