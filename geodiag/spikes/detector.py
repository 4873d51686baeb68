"""Spike detection: one float in, one verdict out."""

import math
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

from geodiag.spikes.drift import Drift
from geodiag.spikes.event import OpenSpike, Row, Spike
from geodiag.spikes.evidence import Evidence
from geodiag.spikes.trend import Trend

__all__ = ["Spike", "SpikeDetector", "Verdict"]

_RISING = 1.5
"""σ above the trend at which a loss may already be rising: an onset is walked back while it is
exceeded.
"""


class Verdict(NamedTuple):
    """What the detector says about one update."""

    score: float
    """Robust σ above the loss's own trend; NaN while there is no trend yet, infinite for a
    non-finite loss.
    """
    raised: Spike | None
    """Detected at this update. An outlier is known only when it is over: it is raised complete."""
    ended: Spike | None
    """Was under way and is over."""
    active: bool
    """Inside a spike, divergence or non-finite stretch right now."""


class SpikeDetector:
    """Streaming spike detection from the loss, with the gradient norm as a second opinion.

    Each update is judged in robust σ above the trend of earlier normal updates (spike_trend.py);
    `hold` steps of a clear excess make a spike, fewer an outlier (spike_evidence.py); a slow climb
    is a divergence (spike_drift.py). Nothing out of range is learned, so a spike cannot hide the
    next one; a loss that stays out of range for
    `patience` updates is a divergence and then the new normal, so nothing blinds the detector for
    good.
    """

    def __init__(
        self,
        *,
        threshold: float = 5.5,
        normal: float = 3.0,
        hold: int = 3,
        drift: float = 8.0,
        patience: int = 256,
        floor: float = 0.006,
        warmup: int = 16,
        short: int = 16,
        long: int = 64,
        noise: int = 128,
        smooth: float = 0.6,
        tails: float = 0.01,
    ) -> None:
        """
        threshold: σ of a clear excess.
        normal: σ up to which a loss is in its range and is learned.
        hold: steps that a clear excess must last, and updates in range that end it; one or two are
        a bad batch.
        drift: σ by which the long median may climb above its best before that is a divergence.
        patience: updates out of range before they are the new normal.
        floor: least σ, as a share of the loss; a very quiet loss need not be watched to the last
        digit.
        warmup: updates before there is a trend.
        short, long: updates in the two medians of the trend.
        noise: updates in the noise estimate.
        smooth: share of the last update that the log must carry over to count as smoothed before
        logging.
        tails: share of near misses above which the noise has heavy tails, and one sparse update is
        no spike.
        """
        if not (
            0 < normal < threshold
            and hold >= 1
            and 4 <= warmup <= short <= long
            and hold <= long
            and noise >= 16
        ):
            raise ValueError(
                "need 0 < normal < threshold, 1 ≤ hold ≤ long, 4 ≤ warmup ≤ short ≤ long, noise ≥ 16"
            )
        self.normal, self.threshold, self.hold, self.patience = normal, threshold, hold, patience
        self._trend = Trend(
            long=long, short=short, noise=noise, warmup=warmup, floor=floor, smooth=smooth
        )
        self._evidence = Evidence(
            threshold=threshold, normal=normal, hold=hold, noise=noise, tails=tails
        )
        self._drift = Drift(limit=drift, memory=2 * patience)
        self._recent: deque[Row] = deque(maxlen=long)
        self._active: OpenSpike | None = None
        self._excursion: OpenSpike | None = None
        self._calm = 0
        self._unlearned = 0
        self._quiet = 0
        self._normal_level = 0.0

    @property
    def current(self) -> Spike | None:
        """What is under way right now, as it stands."""
        return self._active.at(None) if self._active else None

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> Verdict:
        """Judges one update; only updates passed before have a say in it."""
        step, loss = int(step), float(loss)
        last = self._evidence.last_step
        ended = self._go_back(step) if last is not None and step < last else None
        self._evidence.tick(step)
        if not math.isfinite(loss):
            return self._nonfinite(step, ended)
        if self._active and self._active.kind == "nonfinite":
            ended = self._end(step)

        ready, excess = self._trend.ready, self._trend.judge(loss)
        row = Row(step, loss, max(excess) if excess else 0.0)
        in_range = row.score < self.normal
        self._recent.append(row)
        if self._active:
            self._active.grow(row)
        raised = None
        if self._active and self._active.kind == "spike":
            self._unlearned += 1
            self._calm = self._calm + 1 if in_range else 0
            if self._calm >= self.hold and self._is_back():
                ended = self._end(self._recent[-self.hold].step)
        elif excess and self._evidence.add(excess.fresh, grad_norm):
            ended = self._end(step) or ended
            raised = self._spike()
        elif in_range:
            raised = self._outlier(step)
            self._learn(row, grad_norm)
            if self._trend.ready:
                climb, settled = self._follow_drift(row)
                raised, ended = raised or climb, ended or settled
        else:
            self._unlearned += 1
            self._trend.skip()
            if self._excursion:
                self._excursion.grow(row)
            else:
                self._excursion = OpenSpike.over("outlier", [row])
        if self._unlearned > self.patience:
            stayed, over = self._adopt(step)
            raised, ended = raised or stayed, ended or over
        return Verdict(row.score if ready else math.nan, raised, ended, self._active is not None)

    # -- what can happen to a loss -----------------------------------------------------------

    def _spike(self) -> Spike:
        """A spike is raised: walked back from here to where the rise began."""
        rows = list(self._recent)
        first = len(rows) - 1
        while first > 0 and rows[first - 1].score > _RISING:
            first -= 1
        self._active, self._calm = OpenSpike.over("spike", rows[first:]), 0
        self._forget_excursion()
        self._trend.skip()
        return self._active.at(None)

    def _is_back(self) -> bool:
        """The last `hold` updates are in the middle of the range, not merely at its edge."""
        last = [row.score for row in list(self._recent)[-self.hold :]]
        return sum(last) <= self.hold * self.normal / 2

    def _outlier(self, step: int) -> Spike | None:
        """The loss is back in its range and nothing was raised: if it was clearly out, that was an
        outlier.
        """
        excursion = self._excursion
        self._excursion = None
        if excursion is None:
            return None
        if excursion.score < self.threshold:
            self._evidence.near_miss()
            return None
        excursion.detected = step
        return excursion.at(step)

    def _nonfinite(self, step: int, ended: Spike | None) -> Verdict:
        raised = None
        if self._active is None or self._active.kind != "nonfinite":
            ended = self._end(step) or ended
            self._active = OpenSpike("nonfinite", step, step, step, math.inf, math.inf)
            raised = self._active.at(None)
        self._recent.clear()  # an onset is not walked back across it
        self._forget_excursion()
        self._trend.lose_thread()
        return Verdict(math.inf, raised, ended, True)

    def _follow_drift(self, row: Row) -> tuple[Spike | None, Spike | None]:
        """What slow drift raises and ends at this update."""
        level, sigma = self._trend.slow_level, self._trend.sigma
        climb = self._drift.update(row.step, level, sigma)
        if climb:
            self._quiet = 0
            if self._active is None:
                self._normal_level = climb.best
                self._active = OpenSpike(
                    "divergence", row.step, climb.onset, row.step, row.loss, climb.score
                )
                return self._active.at(None), None
        elif self._active:
            self._quiet += 1
            if level <= self._normal_level + self.normal * sigma or self._quiet >= self.patience:
                return None, self._end(row.step)
        return None, None

    def _adopt(self, step: int) -> tuple[Spike | None, Spike | None]:
        """Out of range for so long that this is the new normal: what that raises and ends."""
        raised = ended = None
        was = self._active or self._excursion
        if was and was.kind != "divergence":
            ended = self._end(step)
            self._normal_level = self._trend.slow_level
            self._active = replace(was, kind="divergence", detected=step)
            raised = self._active.at(None)
        self._quiet = 0
        self._trend.adopt([(row.step, row.loss) for row in self._recent])
        self._drift.restart()
        self._recent.clear()
        self._forget_excursion()
        return raised, ended

    def _go_back(self, step: int) -> Spike | None:
        """Training went back to `step`, by a rollback or a resume: what was under way is over."""
        ended = self._end(step)
        self._trend.forget_from(step)
        self._drift.restart()
        self._evidence.restart()
        self._recent.clear()
        self._forget_excursion()
        return ended

    def _end(self, step: int) -> Spike | None:
        over, self._active = self._active, None
        self._unlearned = 0
        return over.at(step) if over else None

    def _learn(self, row: Row, grad_norm: float | None) -> None:
        self._unlearned = 0
        self._trend.learn(row.step, row.loss)
        self._evidence.learn(grad_norm)

    def _forget_excursion(self) -> None:
        self._excursion, self._unlearned = None, 0
        self._evidence.clear()

    # -- saving and resuming -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, as plain JSON-able data without NaN or infinity."""
        return {
            "trend": self._trend.state_dict(),
            "evidence": self._evidence.state_dict(),
            "drift": self._drift.state_dict(),
            "recent": [list(row) for row in self._recent],
            "active": self._active and self._active.state_dict(),
            "excursion": self._excursion and self._excursion.state_dict(),
            "calm": self._calm,
            "unlearned": self._unlearned,
            "quiet": self._quiet,
            "normal_level": self._normal_level,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which a detector with the same options gave."""
        self._trend.load_state_dict(state["trend"])
        self._evidence.load_state_dict(state["evidence"])
        self._drift.load_state_dict(state["drift"])
        self._recent = deque((Row(*row) for row in state["recent"]), maxlen=self._recent.maxlen)
        self._active = OpenSpike.from_state(state["active"]) if state["active"] else None
        self._excursion = OpenSpike.from_state(state["excursion"]) if state["excursion"] else None
        self._calm, self._unlearned = state["calm"], state["unlearned"]
        self._quiet, self._normal_level = state["quiet"], state["normal_level"]
