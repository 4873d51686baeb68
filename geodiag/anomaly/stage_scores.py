"""Stage scores: how far each part of each layer stands from its own past, in robust standard
deviations.
"""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from geodiag.anomaly.baseline import Baseline
from geodiag.anomaly.metric_roles import SIGNALS, Series, least_spread, place_of, rescaled


class Scores:
    """Judges a list of series, one step after another; the same code while training and afterwards."""

    def __init__(
        self, series: Sequence[Series] = (), hashed: Collection[int] = (), patience: int = 64
    ) -> None:
        """hashed: layers whose router is a hash, so that their loads speak for the batch.
        patience: samples out of range that make a new normal.
        """
        self.series: list[Series] = []
        self._hashed = hashed
        self.baseline = Baseline(np.zeros(0), patience=patience)
        self.extend(series)

    def extend(self, series: Sequence[Series]) -> None:
        """More series from here on: a probe that ran for the first time."""
        new = [least_spread(SIGNALS[s.table, s.metric]) for s in series]
        self.baseline.extend(np.array(new, float))
        self.series += series
        signals = [SIGNALS[s.table, s.metric] for s in self.series]
        self._log = np.array([s.noise_scale == "log" for s in signals], bool)
        self._root = np.array([s.noise_scale == "root" for s in signals], bool)
        mine = [place_of(s, self._hashed) for s in self.series]
        both = [
            s.abnormal_sides == "both" or p.part == "data"
            for s, p in zip(signals, mine, strict=True)
        ]
        self._high = np.array(
            [b or s.abnormal_sides == "high" for s, b in zip(signals, both, strict=True)], float
        )
        self._low = np.array(
            [b or s.abnormal_sides == "low" for s, b in zip(signals, both, strict=True)], float
        )
        self.places = sorted(set(mine), key=lambda p: (p.order, p))
        index = {p: i for i, p in enumerate(self.places)}
        self.place_P = np.array([index[p] for p in mine], int)
        """The place that each series speaks for."""
        self._order = np.argsort(self.place_P, kind="stable")
        self._starts = np.flatnonzero(np.diff(self.place_P[self._order], prepend=-1))
        self._few, self._load_of, self._experts = self._rarely_used()
        self._stages = np.array([p.stage or 0 for p in self.places], int)

    def update(self, values: np.ndarray) -> np.ndarray:
        """One step's values of all series → how far each is out of range on a side that matters,
        NaN if unknown.
        """
        z = self.baseline.update(rescaled(values, self._log, self._root))
        score = np.maximum(z * self._high, -z * self._low)
        if len(self._few):  # the activations of an expert with few tokens are noise
            share = values[self._load_of] * self._experts
            score[self._few] *= np.sqrt(np.minimum(np.where(np.isfinite(share), share, 1.0), 1.0))
        return score

    def _rarely_used(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Series of an expert's activations, the series of its load, and how many experts its layer
        has.
        """
        at = {(s.layer, s.expert): i for i, s in enumerate(self.series) if s.metric == "load"}
        count = Counter(layer for layer, _ in at)
        few = [
            i
            for i, s in enumerate(self.series)
            if s.metric in ("act_rms", "act_amax") and (s.layer, s.expert) in at
        ]
        load_of = [at[self.series[i].layer, self.series[i].expert] for i in few]
        return (
            np.array(few, int),
            np.array(load_of, int),
            np.array([count[self.series[i].layer] for i in few], float),
        )

    def by_place(self, scores: np.ndarray) -> np.ndarray:
        """The worst score of every place; NaN where nothing is known."""
        if not len(self.series):
            return np.zeros(0)
        return np.fmax.reduceat(scores[self._order], self._starts)

    def by_stage(self, at_place: np.ndarray) -> dict[int, float]:
        """The worst score of every stage, over all layers; NaN where nothing is known."""
        worst = {}
        for stage in (1, 2, 3):
            mine = at_place[self._stages == stage]
            worst[stage] = (
                float(np.nanmax(mine)) if len(mine) and not np.isnan(mine).all() else float("nan")
            )
        return worst
