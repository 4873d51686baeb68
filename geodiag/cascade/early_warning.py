"""Early warning: says, while a run trains, that a place has left its range, and no spike was raised
yet.

Fed with the same scores that the cascade is told from. A place warns when its scores add up to a
clear excess over at least three samples, so that one odd batch never does; what was told is not
told again until it has been calm, nor what follows from it. While the loss is out of range too, the
detector has the first word: `Held`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geodiag.anomaly.metric_roles import Place
from geodiag.cascade.defence import NAMES, Stage
from geodiag.cascade.origin import EXPLAINS
from geodiag.cascade.words import where
from geodiag.spikes.detector import Verdict

SETTLING = 64
"""Samples before the first warning: while a training settles, everything moves."""


@dataclass(frozen=True, kw_only=True)
class Warning:
    """A place left its range, and no spike was raised yet."""

    step: int
    """When it was said."""
    since: int
    """The step at which the place left its range."""
    stage: Stage
    layer: int | None
    site: str | None
    part: str
    score: float
    """Robust z of the place at `step`."""

    def __str__(self) -> str:
        if self.stage == "data":
            return f"the batches have been out of range since step {self.since}, {self.score:.0f} robust σ"
        place = where(self.layer, self.site)
        return f"{place}: {NAMES[self.stage]} (stage {self.stage}) since step {self.since}, {self.score:.0f} robust σ"

    def details(self) -> dict[str, Any]:
        """What the event `early_warning` holds."""
        names = ("since", "stage", "part", "score")
        return {n: getattr(self, n) for n in names}


class EarlyWarning:
    """Scores of the places in, once a sampled step; a `Warning` out, seldom."""

    def __init__(
        self, *, alarm: float = 20.0, allowed: float = 6.0, most: float = 14.0, spreads: int = 24
    ) -> None:
        """
        alarm: summed excess that warns. allowed: score that is no excess. most: score that one
        sample counts for at most; three samples at least are needed. spreads: samples in which what
        else moves belongs to what was said.
        """
        if not 0 < allowed < most or alarm <= 2 * (most - allowed):
            raise ValueError("need 0 < allowed < most, and an alarm that two samples cannot reach")
        self.alarm, self.allowed, self.most, self.spreads = alarm, allowed, most, spreads
        self._places: list[Place] = []
        self._sum, self._since, self._known = np.zeros(0), np.zeros(0, int), np.zeros(0, int)
        self._told = np.zeros(0, bool)
        self._spreading = 0

    def update(self, step: int, places: Sequence[Place], at_place: np.ndarray) -> Warning | None:
        """The scores of one step."""
        if len(places) != len(self._places):
            self._adopt(list(places))
        known = ~np.isnan(at_place)
        if not known.any():
            return None
        self._known += known
        excess = np.where(known, np.minimum(at_place, self.most) - self.allowed, 0.0)
        self._since[(self._sum <= 0) & (excess > 0)] = step
        self._sum = np.minimum(np.maximum(self._sum + excess, 0.0), 2 * self.alarm) * (
            self._known > SETTLING
        )
        alarms = self._sum >= self.alarm
        news = alarms & ~self._told
        self._told = (self._told | alarms) & (self._sum > 0)
        spreading, self._spreading = self._spreading > 0, self._spreading - 1
        if not news.any():
            return None
        self._spreading = self.spreads  # as long as it goes on, it is the same cascade
        return None if spreading else self._said(step, at_place, alarms)

    def _said(self, step: int, at_place: np.ndarray, alarms: np.ndarray) -> Warning:
        """Of what is out of range, the first in time and then in the order of the step that stands
        out enough.
        """
        rising = np.flatnonzero(self._sum >= EXPLAINS * self._sum[alarms].max())
        k = min((int(k) for k in rising), key=lambda k: (self._since[k], k))
        place = self._places[k]
        whole = place.part == "data"
        return Warning(
            step=step,
            since=int(self._since[k]),
            stage="data" if whole else place.stage,
            layer=None if whole else place.layer,
            site=None if whole else place.site,
            part=place.part,
            score=float(np.nan_to_num(at_place[k])),
        )

    def _adopt(self, places: list[Place]) -> None:
        """More places from here on; what is known of the others is kept."""
        old = {p: i for i, p in enumerate(self._places)}
        keep = [old.get(p) for p in places]
        for name in ("_sum", "_since", "_known", "_told"):
            was = getattr(self, name)
            setattr(self, name, np.array([0 if i is None else was[i] for i in keep], was.dtype))
        self._places = places


class Held:
    """A warning that waits, while the loss is out of range as well, for the word of the spike
    detector.
    """

    def __init__(self, normal: float, wait: int = 5) -> None:
        """normal: σ up to which a loss is in its range. wait: steps in which a detector that will
        speak has spoken.
        """
        self.normal, self.wait = normal, wait
        self._waiting: Warning | None = None

    def update(self, step: int, news: Warning | None, verdict: Verdict) -> Warning | None:
        """What is to be said at this step; nothing more of what a raised spike says louder."""
        said = self._waiting or news
        self._waiting = None
        if said is None or verdict.active:
            return None
        if verdict.score > self.normal and step < said.step + self.wait:
            self._waiting = said
            return None
        return replace(said, step=step)
