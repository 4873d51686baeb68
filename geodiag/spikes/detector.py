"""Spike detection: one float in, one verdict out."""

import math
from typing import Any, NamedTuple

from geodiag.spikes.drift import DriftDetector
from geodiag.spikes.event import OpenSpike, ScoredUpdate, Spike
from geodiag.spikes.evidence import EvidenceAccumulator
from geodiag.spikes.open_events import OpenEvents
from geodiag.spikes.trend import Excess, Trend

__all__ = ["Spike", "SpikeDetector", "Verdict"]


class Verdict(NamedTuple):
    """The detector's result for one update."""

    score: float
    """Robust σ above the trend of the loss; NaN while there is no trend yet, infinite for a
    non-finite loss.
    """
    raised: Spike | None
    """The spike detected at this update. An outlier is raised complete, once it is over."""
    ended: Spike | None
    """The spike that ended at this update."""
    active: bool
    """True while a spike, a divergence or a non-finite stretch is open."""


class _Changes(NamedTuple):
    """What one update raised and ended."""

    raised: Spike | None = None
    ended: Spike | None = None


class SpikeDetector:
    """Streaming spike detection from the loss, optionally confirmed by the gradient norm.

    Each update is scored in robust σ above the trend of earlier normal updates (`trend.py`). A
    clear excess that lasts `hold` steps is a spike; a shorter one is an outlier (`evidence.py`). A
    slow climb is a divergence (`drift.py`).

    Losses out of range are not learned, so that a spike cannot hide the next one. A loss that stays
    out of range for `patience` updates is a divergence, and its level is then accepted as normal,
    so that no event disables the detector for good.

    threshold: score in σ of a clear excess.
    normal: score in σ up to which a loss is in its range and is learned.
    hold: steps that a clear excess must last to be a spike, and updates in range that end it;
    one or two steps are a bad batch.
    drift: rise in σ of the long median above its minimum that is a divergence.
    patience: updates out of range after which their level is accepted as normal.
    floor: least σ, as a share of the loss; changes of a very quiet loss below it are ignored.
    warmup: updates before there is a trend.
    short, long: updates in the two medians of the trend.
    noise: updates in the noise estimate.
    smooth: share of the previous value in each logged loss from which a log counts as smoothed.
    tails: share of near misses from which the noise has heavy tails, so that a single update of
    a sparse log is never a spike.
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
        _check_options(normal, threshold, hold, warmup, short, long, noise)
        self.normal = normal
        self.threshold = threshold
        self.hold = hold
        self.patience = patience
        self._trend = Trend(
            long=long, short=short, noise=noise, warmup=warmup, floor=floor, smooth=smooth
        )
        self._evidence = EvidenceAccumulator(
            threshold=threshold, normal=normal, hold=hold, noise=noise, tails=tails
        )
        self._drift = DriftDetector(limit=drift, memory=2 * patience)
        self._open = OpenEvents(recent=long)
        self._since_climb = 0  # updates since the level last climbed
        self._normal_level = 0.0  # level to which a divergence must return

    @property
    def current(self) -> Spike | None:
        """The spike that is open at present, as far as it is known; None if there is none."""
        return self._open.active.as_spike(None) if self._open.active else None

    def update(self, step: int, loss: float, grad_norm: float | None = None) -> Verdict:
        """Score one update from the updates before it, and return what it raises and ends.

        A step smaller than the previous one is a rollback or a resume.
        """
        step = int(step)
        loss = float(loss)
        last = self._evidence.last_step
        ended = self._handle_rollback(step) if last is not None and step < last else None
        self._evidence.record_step(step)
        if not math.isfinite(loss):
            return self._handle_nonfinite(step, ended)
        if self._open.is_open("nonfinite"):
            ended = self._open.close(step)

        ready = self._trend.ready
        excess = self._trend.judge(loss)
        update = ScoredUpdate(step, loss, max(excess) if excess else 0.0)
        self._open.record(update)

        changes = self._classify(update, excess, grad_norm)
        raised = changes.raised
        ended = changes.ended or ended
        if self._open.unlearned > self.patience:
            accepted = self._accept_level(step)
            raised = raised or accepted.raised
            ended = ended or accepted.ended
        score = update.score if ready else math.nan
        return Verdict(score, raised, ended, self._open.active is not None)

    def _classify(
        self, update: ScoredUpdate, excess: Excess | None, grad_norm: float | None
    ) -> _Changes:
        """Handle an update inside a spike, at the start of a spike, in range, or out of range."""
        in_range = update.score < self.normal
        if self._open.is_open("spike"):
            return _Changes(ended=self._open.continue_spike(in_range, self.normal, self.hold))
        if excess and self._evidence.add(excess.innovation, grad_norm):
            return self._raise_spike(update.step)
        if in_range:
            return self._learn_normal(update, grad_norm)
        self._trend.skip()
        self._open.extend_excursion(update)
        return _Changes()

    def _raise_spike(self, step: int) -> _Changes:
        """Open a spike, which ends a divergence if one is open."""
        ended = self._open.close(step)
        raised = self._open.start_spike()
        self._evidence.clear()
        self._trend.skip()
        return _Changes(raised, ended)

    def _learn_normal(self, update: ScoredUpdate, grad_norm: float | None) -> _Changes:
        """Learn an update in range; it may end an outlier or complete a slow climb."""
        outlier = self._end_excursion(update.step)
        self._trend.learn(update.step, update.loss)
        self._evidence.learn(grad_norm)
        if not self._trend.ready:
            return _Changes(outlier)
        drifted = self._follow_drift(update)
        return _Changes(outlier or drifted.raised, drifted.ended)

    def _end_excursion(self, step: int) -> Spike | None:
        """Return the excursion that ends at `step` if it is an outlier, else count a near miss."""
        excursion = self._open.end_excursion()
        if excursion is None:
            return None
        if excursion.score < self.threshold:
            self._evidence.add_near_miss()
            return None
        excursion.detected = step
        return excursion.as_spike(step)

    def _handle_nonfinite(self, step: int, ended: Spike | None) -> Verdict:
        """Raise `nonfinite` once for each stretch of non-finite losses."""
        raised = None
        if not self._open.is_open("nonfinite"):
            ended = self._open.close(step) or ended
            event = OpenSpike("nonfinite", step, step, step, math.inf, math.inf)
            raised = self._open.start(event)
        self._trend.forget_previous()
        self._forget_recent()
        return Verdict(math.inf, raised, ended, True)

    def _follow_drift(self, update: ScoredUpdate) -> _Changes:
        """Raise a divergence if the slow level has climbed, or end it once the level is back."""
        level = self._trend.slow_level
        sigma = self._trend.sigma
        climb = self._drift.update(update.step, level, sigma)
        if climb:
            self._since_climb = 0
            if self._open.active is None:
                self._normal_level = climb.best
                event = OpenSpike(
                    "divergence", update.step, climb.onset, update.step, update.loss, climb.score
                )
                return _Changes(raised=self._open.start(event))
        elif self._open.active:
            self._since_climb += 1
            is_back = level <= self._normal_level + self.normal * sigma
            if is_back or self._since_climb >= self.patience:
                return _Changes(ended=self._open.close(update.step))
        return _Changes()

    def _accept_level(self, step: int) -> _Changes:
        """Accept the recent level as normal; a spike that caused it becomes a divergence."""
        changes = _Changes()
        divergence = self._open.as_divergence(step)
        if divergence:
            ended = self._open.close(step)
            self._normal_level = self._trend.slow_level
            changes = _Changes(self._open.start(divergence), ended)
        self._since_climb = 0
        self._trend.restart_from([(update.step, update.loss) for update in self._open.recent])
        self._drift.restart()
        self._forget_recent()
        return changes

    def _handle_rollback(self, step: int) -> Spike | None:
        """Forget the updates of `step` and later; return the spike that the rollback ends."""
        ended = self._open.close(step)
        self._trend.rewind_to(step)
        self._drift.restart()
        self._evidence.restart()
        self._forget_recent()
        return ended

    def _forget_recent(self) -> None:
        """Forget the recent updates and the excursion: no onset is searched before this update."""
        self._open.recent.clear()
        self._open.drop_excursion()
        self._evidence.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs, as JSON-able data without NaN or infinity."""
        return {
            "trend": self._trend.state_dict(),
            "evidence": self._evidence.state_dict(),
            "drift": self._drift.state_dict(),
            "quiet": self._since_climb,
            "normal_level": self._normal_level,
            **self._open.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state`, the `state_dict()` of a detector with the same options."""
        self._trend.load_state_dict(state["trend"])
        self._evidence.load_state_dict(state["evidence"])
        self._drift.load_state_dict(state["drift"])
        self._since_climb = state["quiet"]
        self._normal_level = state["normal_level"]
        self._open.load_state_dict(state)


def _check_options(
    normal: float, threshold: float, hold: int, warmup: int, short: int, long: int, noise: int
) -> None:
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
