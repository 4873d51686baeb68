"""Early warning: report a place that left its range before a spike is raised.

The input are the same scores from which the cascade is explained. A place warns when its scores add
up to a clear excess over at least three samples, so that one odd batch never does. A place warns
again only after it was calm, and what moves shortly after a warning belongs to it. While the loss
is out of range too, the warning waits for the spike detector (`PendingWarning`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import SeriesPlace
from geodiag.cascade.defence import NAMES, Stage
from geodiag.cascade.origin import EXPLAINING_SHARE
from geodiag.cascade.verdict_text import place_label
from geodiag.spikes.detector import Verdict

# K places

SETTLING = 64
"""Samples before the first warning: at the start of a training, every metric moves."""

_PER_PLACE = ("_sum_K", "_since_K", "_samples_K", "_reported_K")


@dataclass(frozen=True, kw_only=True)
class EarlyWarning:
    """A place that left its range while no spike was raised."""

    step: int
    """The step of the report."""
    since: int
    """The step at which the place left its range."""
    stage: Stage
    layer: int | None
    site: str | None
    part: str
    score: float
    """Robust z of the place when it was detected."""

    def __str__(self) -> str:
        range_ = f"out of range since step {self.since}, {self.score:.0f} robust σ"
        if self.stage == "data":
            return f"the batch: {range_}"
        place = place_label(self.layer, self.site)
        return f"{place}: stage {self.stage}, {NAMES[self.stage]}; {range_}"

    def details(self) -> dict[str, Any]:
        """Return the `data` of the event `early_warning`."""
        names = ("since", "stage", "part", "score")
        return {n: getattr(self, n) for n in names}


class EarlyWarningDetector:
    """Turns the scores of all places, once a sampled step, into rare early warnings."""

    def __init__(
        self, *, alarm: float = 20.0, allowed: float = 6.0, most: float = 14.0, spreads: int = 24
    ) -> None:
        """
        alarm: summed excess that warns.
        allowed: score up to which a sample is no excess.
        most: score at which one sample is cut, so that at least three samples are needed.
        spreads: samples after a warning in which further alarms belong to it.
        """
        if not 0 < allowed < most or alarm <= 2 * (most - allowed):
            raise ValueError("need 0 < allowed < most, and an alarm that two samples cannot reach")
        self.alarm = alarm
        self.allowed = allowed
        self.most = most
        self.spreads = spreads
        self._places: list[SeriesPlace] = []
        self._sum_K = np.zeros(0)
        self._since_K = np.zeros(0, int)
        self._samples_K = np.zeros(0, int)
        self._reported_K = np.zeros(0, bool)
        self._spreading = 0  # samples left in which alarms belong to the last warning

    def update(
        self, step: int, places: Sequence[SeriesPlace], score_K: np.ndarray
    ) -> EarlyWarning | None:
        """Add the scores of one step; return a warning if a new place is out of range."""
        if len(places) != len(self._places):
            self._set_places(list(places))
        known = ~np.isnan(score_K)
        if not known.any():
            return None
        self._accumulate(step, score_K, known)

        alarms = self._sum_K >= self.alarm
        new = alarms & ~self._reported_K
        self._reported_K = (self._reported_K | alarms) & (self._sum_K > 0)
        spreading = self._spreading > 0
        self._spreading -= 1
        if not new.any():
            return None
        self._spreading = self.spreads  # each further alarm prolongs the same cascade
        return None if spreading else self._warning(step, score_K, alarms)

    def _accumulate(self, step: int, score_K: np.ndarray, known: np.ndarray) -> None:
        """Add the excess of each place to its sum."""
        # Idea: a CUSUM for each place: S[t] = clip(S[t-1] + min(score, most) − allowed, 0, 2 alarm)
        # (Page 1954, Biometrika 41). The bound lets a place become calm soon after its last excess.
        self._samples_K += known
        excess = np.where(known, np.minimum(score_K, self.most) - self.allowed, 0.0)
        self._since_K[(self._sum_K <= 0) & (excess > 0)] = step
        total = np.minimum(np.maximum(self._sum_K + excess, 0.0), 2 * self.alarm)
        self._sum_K = total * (self._samples_K > SETTLING)

    def _warning(self, step: int, score_K: np.ndarray, alarms: np.ndarray) -> EarlyWarning:
        """Return a warning for the first place out of range, in time and then in a step's order.

        A place counts if its sum is at least a share of the largest one, as in `rank_origins`.
        """
        rising = np.flatnonzero(self._sum_K >= EXPLAINING_SHARE * self._sum_K[alarms].max())
        k = min((int(k) for k in rising), key=lambda k: (self._since_K[k], k))
        place = self._places[k]
        is_batch = place.part == "data"
        return EarlyWarning(
            step=step,
            since=int(self._since_K[k]),
            stage="data" if is_batch else place.stage,
            layer=None if is_batch else place.layer,
            site=None if is_batch else place.site,
            part=place.part,
            score=float(np.nan_to_num(score_K[k])),
        )

    def _set_places(self, places: list[SeriesPlace]) -> None:
        """Add places; the sums of the present ones are kept."""
        index = {p: i for i, p in enumerate(self._places)}
        source = [index.get(p) for p in places]
        for name in _PER_PLACE:
            old = getattr(self, name)
            new = np.array([0 if i is None else old[i] for i in source], old.dtype)
            setattr(self, name, new)
        self._places = places


class PendingWarning:
    """Holds a warning back while the loss is out of range, until the spike detector decides."""

    def __init__(self, normal: float, wait: int = 5) -> None:
        """
        normal: score in σ up to which a loss is in its range.
        wait: steps after which the spike detector has had time to raise a spike.
        """
        self.normal = normal
        self.wait = wait
        self._waiting: EarlyWarning | None = None

    def update(self, step: int, new: EarlyWarning | None, verdict: Verdict) -> EarlyWarning | None:
        """Return the warning to report at this step; a raised spike replaces the warning."""
        warning = self._waiting or new
        self._waiting = None
        if warning is None or verdict.active:
            return None
        if verdict.score > self.normal and step < warning.step + self.wait:
            self._waiting = warning
            return None
        return replace(warning, step=step)
