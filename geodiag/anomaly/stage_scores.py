"""Stage scores: how far each part of each layer is from its own past, in robust σ."""

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from geodiag.anomaly.baseline import Baseline
from geodiag.anomaly.metric_roles import SIGNALS, Series, least_spread, place_of, rescaled

# P series, K places


class StageScorer:
    """Scores a list of series, one step after another, during the training or afterwards."""

    def __init__(
        self, series: Sequence[Series] = (), hashed: Collection[int] = (), patience: int = 64
    ) -> None:
        """
        hashed: layers with a hash router, whose loads depend on the batch alone.
        patience: samples out of range after which their level is accepted as normal.
        """
        self.series: list[Series] = []
        self._hashed = hashed
        self.baseline = Baseline(np.zeros(0), patience=patience)
        self.extend(series)

    def extend(self, series: Sequence[Series]) -> None:
        """Add series, for example those of a probe that ran for the first time."""
        floors = [least_spread(SIGNALS[s.table, s.metric]) for s in series]
        self.baseline.extend(np.array(floors, float))
        self.series += series
        self._read_roles()
        self._group_by_place()
        self._find_expert_activations()

    def _read_roles(self) -> None:
        """Look up the scale and the abnormal sides of each series."""
        metrics = [SIGNALS[s.table, s.metric] for s in self.series]
        self._log = np.array([m.noise_scale == "log" for m in metrics], bool)
        self._root = np.array([m.noise_scale == "root" for m in metrics], bool)

        # Batch statistics are abnormal on both sides, whatever is bad for the metric elsewhere.
        batch = [place_of(s, self._hashed).part == "data" for s in self.series]
        sides = ["both" if b else m.abnormal_sides for b, m in zip(batch, metrics, strict=True)]
        self._high = np.array([side in ("high", "both") for side in sides], float)
        self._low = np.array([side in ("low", "both") for side in sides], float)

    def _group_by_place(self) -> None:
        """Sort the places by their order in a step, and the series by place."""
        place_of_each = [place_of(s, self._hashed) for s in self.series]
        self.places = sorted(set(place_of_each), key=lambda p: (p.order, p))
        index = {p: i for i, p in enumerate(self.places)}
        self.place_P = np.array([index[p] for p in place_of_each], int)
        """The index of the place of each series."""
        self._order = np.argsort(self.place_P, kind="stable")
        self._starts = np.flatnonzero(np.diff(self.place_P[self._order], prepend=-1))
        self._stages = np.array([p.stage or 0 for p in self.places], int)

    def _find_expert_activations(self) -> None:
        """Find the activations of single experts, the load of each, and its number of experts."""
        load_index = {
            (s.layer, s.expert): i for i, s in enumerate(self.series) if s.metric == "load"
        }
        experts_in = Counter(layer for layer, _ in load_index)
        found = [
            i
            for i, s in enumerate(self.series)
            if s.metric in ("act_rms", "act_amax") and (s.layer, s.expert) in load_index
        ]
        loads = [load_index[self.series[i].layer, self.series[i].expert] for i in found]
        counts = [experts_in[self.series[i].layer] for i in found]
        self._activations = np.array(found, int)
        self._activation_load = np.array(loads, int)
        self._activation_experts = np.array(counts, float)

    def update(self, values: np.ndarray) -> np.ndarray:
        """Return the score of each series from its value at this step.

        The score is the robust z on a side that is bad for the metric; NaN if unknown.
        """
        z = self.baseline.update(rescaled(values, self._log, self._root))
        score: np.ndarray = np.maximum(z * self._high, -z * self._low)
        if len(self._activations):
            # Activations of an expert with few tokens are noisy: the error of a mean over n tokens
            # grows as 1/√n, so the score is multiplied by √(load · experts) if that is below 1.
            share = values[self._activation_load] * self._activation_experts
            share = np.where(np.isfinite(share), share, 1.0)
            score[self._activations] *= np.sqrt(np.minimum(share, 1.0))
        return score

    def by_place(self, score_P: np.ndarray) -> np.ndarray:
        """Return the worst score of each place; NaN if unknown."""
        if not len(self.series):
            return np.zeros(0)
        worst_K: np.ndarray = np.fmax.reduceat(score_P[self._order], self._starts)
        return worst_K

    def by_stage(self, score_K: np.ndarray) -> dict[int, float]:
        """Return the worst score of each stage over all layers; NaN if unknown."""
        worst = {}
        for stage in (1, 2, 3):
            scores = score_K[self._stages == stage]
            known = len(scores) and not np.isnan(scores).all()
            worst[stage] = float(np.nanmax(scores)) if known else float("nan")
        return worst
